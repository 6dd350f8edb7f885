"""Which model it is, and on what arithmetic it runs: what tells the certificates of one run from those of another."""

import hashlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from dis import get_instructions
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rs_plugins.core.models import UnseenModule, digest

_LONG = 200  # characters of a description, of longer ones a hash
_DEEP = 60  # values inside each other; of objects further inside, only the class
_OWN = frozenset(vars(nn.Module()))  # torch's bookkeeping, and `training`
_COMPILER = "_torchdynamo_"  # attributes of compiled modules begin so; one is an address
_KNOWN_BY_VERSION = ("torch", "numpy")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_STORES = ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL")
_FILLS = frozenset({"STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR"})
_FILLING = frozenset({"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"})
_MAKING = frozenset({"__init__", "__new__", "__post_init__", "__setstate__"})


def identity(model: nn.Module) -> str:
    """Return a SHA-256 over all of ``model`` that can be seen to decide its logits, as 64 hexadecimal digits.

    Beside what `rs_plugins.core.models.digest` covers: for each submodule its class, its hooks, its attributes that are
    numbers, text, tensors, functions, objects or containers of those, and the bytecode of ``forward`` with the methods
    and global functions that it names. An object that can be called is described like a module, of others class and
    public attributes count. Not seen are the insides of objects of torch, NumPy and the standard library, what is
    reached through an imported module's name, and an attribute that ``forward`` itself assigns: that is a state and not
    a setting. Nor are attributes of objects that their methods assign, or, if they are containers, may fill. Of an
    `UnseenModule` only the name is known, which then stands before the digits. Bytecode, and so the digits, differ
    between versions of Python; neither devices nor train and eval mode count.
    """
    lines = _Account().whole(model)
    unseen, digits = lines[0][:-64], lines[0][-64:]
    return unseen + hashlib.sha256("\n".join([digits, *lines[1:]]).encode()).hexdigest()


def numerics(device: torch.device) -> str:
    """Return the hardware and the settings of torch on which the rounding of logits on ``device`` depends."""
    backends = torch.backends
    if device.type != "cuda":
        return f"{backends.cpu.get_cpu_capability()}, float32 matmul {_matmul_precision(backends.mkldnn)}"
    flags = {
        "cudnn TF32": backends.cudnn.allow_tf32,
        "cudnn": backends.cudnn.enabled,
        "cudnn benchmark": backends.cudnn.benchmark,
        "deterministic": backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
        "float16 sums": backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bfloat16 sums": backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }
    states = [f"{name} {'on' if state else 'off'}" for name, state in flags.items()]
    precision = f"float32 matmul {_matmul_precision(backends.cuda)}"
    return ", ".join([torch.cuda.get_device_name(device), precision, *states])


def _matmul_precision(backend: Any) -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer names, on which the older ones will not comment
        return f"as {backend.matmul.fp32_precision}"


class _Account:
    """Describes values in texts that are equal in another process, on another device and of a copy."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # what is being described: a value may hold itself
        self._registered: set[int] = set()  # modules that have a description of their own
        self._functions: dict[FunctionType, str] = {}
        self._objects: dict[int, tuple[Any, str]] = {}  # with the objects, so that no other one gets their ids

    def whole(self, model: nn.Module) -> list[str]:
        """Return the descriptions of ``model``, with its weights first, and of each of its submodules."""
        self._registered.update(map(id, model.modules()))
        parts = [f"{name}: " + "\n".join(self._module(part)) for name, part in model.named_modules()]
        return [digest(model), *parts]

    def of(self, value: Any) -> str:
        """Return the description of ``value``."""
        if isinstance(value, FunctionType) and value in self._functions:
            return self._functions[value]
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            text = self._text(value)
        finally:
            self._open.discard(id(value))
        text = hashlib.sha256(text.encode()).hexdigest() if len(text) > _LONG else text
        if isinstance(value, FunctionType):
            self._functions[value] = text
        return text

    def _text(self, value: Any) -> str:
        match value:
            case Tensor() | np.ndarray() | np.generic():
                return _array(value)
            case Enum():
                return f"{_name(type(value))}.{value.name}"
            case str() if _DEVICE.fullmatch(value):
                return "a device"
            case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype():
                return repr(value)
            case tuple() | list():
                return f"[{', '.join(map(self.of, value))}]"
            case set() | frozenset():
                return f"{{{', '.join(sorted(map(self.of, value)))}}}"
            case dict():
                return f"{{{', '.join(sorted(f'{self.of(key)}: {self.of(item)}' for key, item in value.items()))}}}"
            case nn.Module():  # in a list, say, or a closure: torch does not see its weights
                return "a submodule" if id(value) in self._registered else "\n".join(self.whole(value))
            case CodeType():
                return self.of((value.co_code, value.co_names, value.co_consts))
            case FunctionType():
                return "\n".join(self._function(value))
            case MethodType():
                return self.of((value.__func__, value.__self__))
            case partial():
                return self.of((value.func, value.args, value.keywords))
            case type() | BuiltinFunctionType():
                return _name(value)
            case itemgetter() | attrgetter() | methodcaller():
                return self.of(value.__reduce__())
        if is_dataclass(value) and not callable(value):
            settings = {field.name: getattr(value, field.name, None) for field in fields(value)}
            return _name(type(value)) + self.of(settings)
        if _is_closed(value) or len(self._open) > _DEEP:
            return _name(type(value))
        if id(value) not in self._objects:
            self._objects[id(value)] = (value, "\n".join(self._object(value)))
        return self._objects[id(value)][1]

    def _object(self, value: Any) -> Iterator[str]:
        """Describe its class, the code that a call of it reaches, and its settings."""
        kind = type(value)
        yield _name(kind)
        if callable(value):
            functions = list(_reached(kind, []))
            yield from map(self.of, functions)
        else:
            found = [_function_in(base, name) for base in kind.__mro__ for name in vars(base) if name not in _MAKING]
            functions = [function for function in found if function is not None]
        codes = [function.__code__ for function in functions]
        states, fills = set().union(*map(_stored, codes)), any(map(_may_fill, codes))
        for name, item in sorted(_attributes(value).items()):
            state = name in states or (fills and isinstance(item, list | dict | set))
            if not state and (callable(value) or not name.startswith("_")):
                yield f"{name} = {self.of(item)}"

    def _module(self, module: nn.Module) -> Iterator[str]:
        yield _name(type(module))
        if isinstance(module, UnseenModule):
            return
        own = vars(module)
        hooks = [hook for kind in ("pre_hooks", "hooks") for hook in own.get(f"_forward_{kind}", {}).values()]
        yield from (f"hook {self.of(hook)}" for hook in hooks)
        functions = list(_reached(type(module), [own.get("forward"), *hooks]))
        yield from map(self.of, functions)
        states = _OWN.union(*(_stored(function.__code__) for function in functions))
        yield from (
            f"{name} = {self.of(own[name])}" for name in sorted(own.keys() - states) if not name.startswith(_COMPILER)
        )
        if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "code"):
            yield str(module.code)

    def _function(self, function: FunctionType) -> Iterator[str]:
        """Describe its code and the settings and functions outside that it names, but not what may be its memory."""
        yield f"{_plain_module(function)}.{function.__qualname__}"
        if _known(function):
            return
        code = function.__code__
        yield from map(self.of, (code, function.__defaults__, function.__kwdefaults__))
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        outside = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        outside |= {name: function.__globals__[name] for name in _globals(code) if name in function.__globals__}
        for name in sorted(outside.keys() - _stored(code)):
            if not isinstance(outside[name], list | dict | set | ModuleType):
                yield f"{name} = {self.of(outside[name])}"


def _reached(kind: type, more: list[Any]) -> Iterator[FunctionType]:
    """Yield the functions of a class that a call reaches by name, and those of ``more``."""
    names, done = ["__call__", "forward"], {"__init__"}
    functions = [f for f in (getattr(value, "__func__", value) for value in more) if isinstance(f, FunctionType)]
    while functions or names:
        for function in functions:
            if not _known(function):
                yield function
                names += sorted(_names(function.__code__))
        found = [_function_in(base, name) for name in names if name not in done for base in kind.__mro__]
        done.update(names)
        functions, names = [function for function in dict.fromkeys(found) if function is not None], []


def _function_in(kind: type, name: str) -> FunctionType | None:
    value = vars(kind).get(name)
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType) -> set[str]:
    return set(chain.from_iterable(part.co_names for part in _codes(code)))


def _globals(code: CodeType) -> set[str]:
    """Return the names that ``code`` looks up outside of any object."""
    steps = chain.from_iterable(map(get_instructions, _codes(code)))
    return {str(step.argval) for step in steps if step.opname in _LOADS}


def _stored(code: CodeType) -> set[str]:
    """Return the names of attributes and outside variables that ``code`` assigns."""
    steps = chain.from_iterable(map(get_instructions, _codes(code)))
    return {str(step.argval) for step in steps if step.opname in _STORES}


def _may_fill(code: CodeType) -> bool:
    """Return whether ``code`` may change what is in some container."""
    steps = chain.from_iterable(map(get_instructions, _codes(code)))
    return not _FILLING.isdisjoint(_names(code)) or not _FILLS.isdisjoint(step.opname for step in steps)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, also those in slots."""
    slots = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    names = chain.from_iterable([names] if isinstance(names, str) else names for names in slots)
    there = {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}
    own = getattr(value, "__dict__", None)
    return there | own if isinstance(own, dict) else there


def _is_closed(value: Any) -> bool:
    """Return whether an object is of a package whose version tells enough, or may well hold what is no setting."""
    package = _plain_module(type(value)).partition(".")[0]
    if isinstance(value, Namespace | SimpleNamespace):
        return False
    return package in _KNOWN_BY_VERSION or package in sys.stdlib_module_names


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _known(function: FunctionType) -> bool:
    return _plain_module(function).partition(".")[0] in _KNOWN_BY_VERSION


def _plain_module(thing: Any) -> str:
    return str(thing.__module__).replace("__mp_main__", "__main__")  # what a spawned process calls the main script


def _name(kind: Any) -> str:
    return f"{_plain_module(kind)}.{kind.__qualname__}"


def _array(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            return f"{value.layout} {value.dtype} {tuple(value.shape)}"
        plain = value.detach().cpu().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        content = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
    return f"{value.dtype}{tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
