"""Chat templates, rendered as transformers does: the same Jinja settings, filters and globals.

A template comes with a model, so it runs in Jinja's sandbox; what it raises is the client's error.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prfaas.model.errors import ConfigError

K_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

K_FAULTS = (
    jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What a template may run into with messages that it wasn't written for."""


class TemplateError(Exception):
    """The template refused the messages; the text is for the client."""


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; in serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """One model's template. Threads may render at once."""

    def __init__(self, source: str, origin: str, special_tokens: dict[str, str]) -> None:
        """Raises ConfigError when `source`, read from `origin`, isn't a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
            # A plain dictionary: going through the library's chain of them takes most of a short render.
            self._template.globals = dict(self._template.globals)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                origin, f"line {error.lineno}", str(error.message), "expected a Jinja template"
            ) from None
        self._special = special_tokens
        self.wants_parts = _wants_parts(environment, source)

    def render(self, messages: list[dict[str, Any]], **variables: object) -> str:
        """The prompt. Raises TemplateError."""
        try:
            return self._template.render(messages=messages, **{**self._special, **variables})
        except TemplateError:
            raise
        except K_FAULTS as error:
            raise TemplateError(str(error)) from None


def _wants_parts(environment: jinja2.Environment, source: str) -> bool:
    """Whether the template goes through a message's content part by part, rather than taking it as a string.

    SGLang decides the same way: a loop over the content of `message`, `msg` or `m`, or any word of media.
    """
    if any(word in source for word in ("image", "audio", "video", "vision")):
        return True
    return any(_is_content(loop.iter) for loop in environment.parse(source).find_all(nodes.For))


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter | nodes.Test):
        return node.node is not None and _is_content(node.node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
    elif isinstance(node, nodes.Getattr):
        key = node.attr
    else:
        return False
    return (
        key == "content" and isinstance(node.node, nodes.Name) and node.node.name in ("message", "msg", "m")
    )


def load_template(folder: Path, override: str | None) -> ChatTemplate | None:
    """The folder's template with its special tokens; None where the model has none. Raises ConfigError."""
    settings = _settings(folder / "tokenizer_config.json")
    special: dict[str, str] = {}
    for name in K_TOKENS:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            special[name] = token
    origin = Path(override) if override else folder / "chat_template.jinja"
    if origin.is_file():
        return ChatTemplate(_text(origin), str(origin), special)
    if override:
        raise ConfigError(override, "chat_template", override, "no such file")
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, str(folder / "tokenizer_config.json"), special)


def _text(path: Path) -> str:
    """Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), "the file", error.strerror, "expected to read it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "the file", str(error), "expected UTF-8") from None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(str(path), "the file", str(error), "expected JSON") from None
    return found if isinstance(found, dict) else {}
