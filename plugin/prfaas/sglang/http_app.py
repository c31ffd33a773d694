"""SGLang's HTTP application for servers with several HTTP workers (`--tokenizer-worker-num` above 1).

SGLang loads no plugins in those workers: each imports the application by the name in its own environment
variable, `touch_points.K_APP_PATH`. The plugin puts this module there, which loads the plugins before the
application, so that workers know the backend and answer refusals as one process does.
"""

from __future__ import annotations

from prfaas.sglang import compat, plugin

compat.load_plugins()
plugin.serve_http_in_worker()
app = compat.app
