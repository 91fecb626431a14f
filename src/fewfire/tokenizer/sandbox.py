"""A jinja2 environment for chat templates, which are programs from strangers: no attributes but data, bounded work.

Loop turns, calls and characters are counted, and no value may grow past a limit; what exceeds its budget stops. The
counts are the same on every machine; a clock of processor time stands behind them.
"""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000  # loop turns, calls and additions
MAX_SECONDS = 10.0  # of this thread's processor time
_MAX_BITS = 4096  # of a number
_PARTS_A_STEP = 16  # of a list or mapping that is met for the first time
_TICK, _JOIN, _HOLD = "fewfire_tick", "fewfire_join", "fewfire_hold"

# What templates of published models use; none of these makes much out of little, but for the three measured ones.
_FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float indent int items join last length list lower map max "
    "min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper wordcount".split()
)
_TEXT_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper".split()
)
_DATA_METHODS = frozenset("copy count get index items keys values".split())


class LimitError(Exception):
    """A template did more than its budget allows."""


class RefusalError(Exception):
    """The template called raise_exception: the messages are not as it wants them."""


class Budget:
    """What one rendering may still do, and the weight (characters, about) of every container it has met."""

    def __init__(self, characters: int, now: datetime.datetime):
        self.steps, self.characters, self.limit, self.now = MAX_STEPS, characters, characters, now
        self.deadline = time.thread_time() + MAX_SECONDS
        self._weights: dict[int, tuple[Any, int]] = {}  # the value is kept so that its id stays its own

    def tick(self, steps: int = 1) -> None:
        """Count work."""
        self.steps -= steps
        if self.steps < 0 or time.thread_time() > self.deadline:
            raise LimitError("it loops for too long")

    def spend(self, characters: int) -> None:
        """Count text before it is made."""
        self.characters -= characters
        if self.characters < 0:
            raise LimitError("it makes too much text")

    def weigh(self, value: Any) -> int:
        """The length of `value` as text, about. Shared parts count as often as they would be shown."""
        if isinstance(value, str):
            return len(value) + 4
        if not isinstance(value, (Mapping, list, tuple)):
            return value.bit_length() // 3 if isinstance(value, int) else 8
        known = self._weights.get(id(value))
        if known is None:
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            self.tick(len(parts) // _PARTS_A_STEP)
            known = self._weights[id(value)] = (value, 4 + sum(map(self.weigh, parts)))
        if known[1] > self.limit:
            raise LimitError("its values grow too large")
        return known[1]


class _Counted(NodeTransformer):
    """Has every loop and macro count itself and its constant text, and weighs every list made."""

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        length = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, nodes.Const(length))))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(_JOIN, *node.nodes)

    def _held(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _call(_HOLD, node)

    visit_List = visit_Tuple = visit_Dict = _held

    def _refused(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"line {node.lineno}: it loads other templates")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refused


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's part for training; here only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Compiled templates may be run from several threads, each run `within` its own budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, tojson: Callable[..., str]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=self._count_output
        )
        self._runs = threading.local()
        own = {name: self._weighed(name, function) for name, function in self.filters.items() if name in _FILTERS}
        self.filters = own | {"tojson": self._weighed("tojson", tojson)}
        self._ticks = self._tick
        self.globals = {
            "range": self._range,
            "namespace": self.globals["namespace"],
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime,
            _TICK: self._ticks,
            _JOIN: self._join,
            _HOLD: self._hold,
        }

    def run(self, template: Any, variables: Mapping[str, Any], budget: Budget) -> str:
        """Render a compiled template. Raises LimitError, RefusalError, and what jinja2 and the template raise."""
        self._runs.budget = budget
        try:
            return template.render(variables)
        finally:
            self._runs.budget = None

    @property
    def budget(self) -> Budget:
        """This thread's run."""
        return self._runs.budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    # ------------------------------------------------------------------------------------------- access

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods of texts, lists and mappings that read; public parts of jinja2's own objects; nothing else."""
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, (Mapping, list, tuple)):
            return attr in _DATA_METHODS
        return type(obj).__module__.startswith("jinja2.") and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`: its widths make much out of little."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise at once: a template that reaches for internals is not one to go on with."""
        raise SecurityError(f"it reaches for the attribute '{attribute}' of a {type(obj).__name__}")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls are counted, their arguments weighed; methods that make text are measured before they run."""
        self.budget.tick()
        if obj is self._ticks:
            return obj(*args)
        for value in (*args, *kwargs.values()):
            self.budget.weigh(value)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._measure(getattr(obj, "__name__", ""), (owner, *args))
        return super().call(context, obj, *args, **kwargs)

    # --------------------------------------------------------------------------------------------- work

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic whose result may be large is measured before it is done."""
        self.budget.tick()
        weigh = self.budget.weigh
        if operator == "+" and isinstance(left, (str, list, tuple)):
            self.budget.spend(weigh(left) + weigh(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self.budget.spend(weigh(value) * max(times, 0))
            _check_bits(_bits(left) + _bits(right))
        elif operator == "**":
            _check_bits(_bits(left) * abs(right) if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            if re.search(r"\d{4}|\*", left):
                raise LimitError("its format is too wide")
            self.budget.spend(len(left) + left.count("%") * 1000 + weigh(right))
        return self._hold(super().call_binop(context, operator, left, right))

    def _tick(self, characters: int) -> None:
        """The text of a loop's turn; the turn itself is counted by the call."""
        self.budget.spend(abs(characters))

    def _hold(self, value: Any) -> Any:
        self.budget.weigh(value)
        return value

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.budget.tick(min(len(numbers), MAX_STEPS + 1))
        return numbers

    def _join(self, *values: Any) -> str:
        self.budget.spend(sum(map(self.budget.weigh, values)))
        return "".join(map(str, values))

    def _count_output(self, value: Any) -> Any:
        if getattr(self._runs, "budget", None) is None:
            return value  # a constant, at compile time
        if not isinstance(value, (str, int, float, Mapping, list, tuple, Undefined, type(None))):
            raise SecurityError(f"it shows a {type(value).__name__}")
        self.budget.spend(self.budget.weigh(value))
        return value

    def _weighed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps the mark that tells jinja2 what to pass first
        def weighed(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            data = args[1:] if hasattr(function, "jinja_pass_arg") else args
            if name in ("join", "map", "select", "list", "sort", "unique") and data and not _is_data(data[0]):
                data = (list(data[0]), *data[1:])
                args = (*args[: len(args) - len(data)], *data)
            for value in (*data, *kwargs.values()):
                self.budget.weigh(value)
            self._measure(name, (*data, *kwargs.values()))
            return self._hold(function(*args, **kwargs))

        return weighed

    def _measure(self, name: str, data: tuple[Any, ...]) -> None:
        """Count what `name` (a filter, or a method of the text data[0]) makes, where that can be much."""
        weigh = self.budget.weigh
        if name == "join":
            items = next((value for value in data if isinstance(value, (Mapping, list, tuple))), ())
            separators = sum(len(value) for value in data if isinstance(value, str))
            self.budget.spend(weigh(items) + len(items) * separators)
        elif name == "replace":
            text, old, new = (str(value) for value in (*data, "", "", "")[:3])
            self.budget.spend(weigh(text) + text.count(old) * len(new))
        elif name == "indent":
            width = sum(value if isinstance(value, int) else weigh(value) for value in data[1:]) or 4
            self.budget.spend(weigh(data[0]) + (str(data[0]).count("\n") + 1) * abs(width))
        elif data:
            self.budget.spend(weigh(data[0]) if name == "tojson" else 0)

    def _strftime(self, form: str) -> str:
        if len(form) > 200 or re.search(r"\d{3}", form):
            raise LimitError("its date format is too long")
        return self.budget.now.strftime(form)


def _raise_exception(message: Any = "") -> None:
    raise RefusalError(str(message))


def _is_data(value: Any) -> bool:
    return isinstance(value, (str, Mapping, list, tuple, range, Undefined))


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitError("its numbers grow too large")
