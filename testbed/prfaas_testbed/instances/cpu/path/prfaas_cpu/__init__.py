"""What a CPU server of the testbed needs beside the kernels: an SGLang plugin,
`prfaas_cpu.plugin:load_plugin`.
"""
