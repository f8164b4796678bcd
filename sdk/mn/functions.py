"""`@mn.function` and the handle that it makes. Little of the standard library: this also loads in every sandbox."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, Generic, ParamSpec, TypeVar, overload

    from mn.aio import AioFunction

    P = ParamSpec("P")
    R = TypeVar("R")
else:

    class Generic:
        """Subscriptable like `typing.Generic`, whose import would cost a sandbox milliseconds."""

        def __class_getitem__(cls, _):
            return cls

    P = R = Any = None


_GENERATORS = 0x20 | 0x200  # CO_GENERATOR, CO_ASYNC_GENERATOR
_UNSET: Any = object()


class Function(Generic[P, R]):
    """A function that can run here (`local`, or a plain call) and on the pool (`remote`, `map` and their kin).

    The first remote call from a process deploys the function, with what it imports, as a version private to that
    process.
    """

    raw_function: Callable[P, R] | None
    """The function as it was written; None for one that was looked up."""
    name: str
    """What the pool calls it."""
    settings: dict[str, Any]
    """What the decorator was given."""
    timeout: float | None
    """Seconds that each call may take, instead of the function's own setting."""

    def __init__(
        self, raw_function: Callable[P, R] | None, name: str, settings: Mapping[str, Any], timeout: float | None = None
    ) -> None:
        self.raw_function = raw_function
        self.name = name
        self.settings = dict(settings)
        self.timeout = timeout
        if raw_function is not None:
            self.__doc__ = raw_function.__doc__
            self.__name__ = raw_function.__name__
            self.__qualname__ = raw_function.__qualname__
            self.__module__ = raw_function.__module__
            self.__wrapped__ = raw_function

    @property
    def is_generator(self) -> bool:
        code = getattr(self.raw_function, "__code__", None)
        return code is not None and bool(code.co_flags & _GENERATORS)

    @property
    def shares_main(self) -> bool:
        """Whether its sandbox has this process's `__main__`, because that is the script in which the function is
        defined.
        """
        raw = self.raw_function
        return raw is not None and raw.__module__ in ("__main__", "__mn_main__") and is_in_file(raw)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.local(*args, **kwargs)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it here, in this process, as plain Python."""
        if self.raw_function is None:
            from mn.formats.errors import InvalidRequest

            raise InvalidRequest(f"the code of {self.name} is on the pool and not here: call {self.name}.remote(…)")
        return self.raw_function(*args, **kwargs)

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run it in a sandbox on the pool and return the result; for `async def`, the awaited one.

        Raises what the function raised, with the remote traceback beneath, or an error of `mn.errors`.
        """
        from mn import call

        if self.is_generator:
            from mn.formats.errors import InvalidRequest

            raise InvalidRequest(f"{self.name} is a generator: iterate over {self.name}.remote_gen(…)")
        transport = call.transport()
        payload = call.encode(self, args, kwargs)
        return call.decode(self, *transport.call(self.pool_name(), call.PICKLE, payload, self.timeout))

    def remote_gen(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        """Run a generator in a sandbox and yield its values as they come. Closing the iterator cancels it."""
        from mn import call

        transport = call.transport()
        payload = call.encode(self, args, kwargs)
        for answer in transport.stream(self.pool_name(), call.PICKLE, payload, self.timeout):
            yield call.decode(self, *answer)

    def map(
        self, *iterables: Iterable[Any], order_outputs: bool = True, return_exceptions: bool = False
    ) -> Iterator[Any]:
        """Call it for each item, or for the items of several iterables side by side, and yield the results as they
        come.

        Inputs are consumed as calls end, never far ahead. `order_outputs=False` yields whatever is ready first;
        `return_exceptions=True` yields exceptions in their places instead of raising the first. Closing the iterator
        cancels what runs. A terminal gets a progress bar.
        """
        from mn.maps import Rows, run

        return run(self, Rows.of_iterables(iterables), order_outputs, return_exceptions)

    def starmap(
        self, rows: Iterable[tuple[Any, ...]], *, order_outputs: bool = True, return_exceptions: bool = False
    ) -> Iterator[Any]:
        """Like `map`, but each item is a tuple of arguments."""
        from mn.maps import Rows, run

        return run(self, Rows.of_tuples(rows), order_outputs, return_exceptions)

    @property
    def aio(self) -> AioFunction:
        """The same calls, to be awaited: `await f.aio.remote(…)`, `async for item in f.aio.map(…)`."""
        from mn.aio import AioFunction

        return AioFunction(self)

    def options(self, *, timeout: float | None = _UNSET) -> Function[P, R]:
        """A copy whose calls have another deadline, in seconds."""
        if timeout is not None and timeout is not _UNSET and not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, not {timeout!r}")
        return Function(self.raw_function, self.name, self.settings, self.timeout if timeout is _UNSET else timeout)

    def pool_name(self) -> str:
        """The name to call it by; deploys it first, when this process has not yet done so."""
        from mn.call import inside_sandbox

        if self.raw_function is None or inside_sandbox():
            return self.name
        from mn.app import deployed_name

        return deployed_name(self)

    def __repr__(self) -> str:
        return f"<mn.Function {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        module = getattr(self.raw_function, "__module__", None)
        return _referred, (module, getattr(self.raw_function, "__qualname__", ""), self.name, self.timeout)


def _referred(module: str | None, qualname: str, name: str, timeout: float | None) -> Function[Any, Any]:
    """The handle that a pickled one stands for: the one in its module, or else one that knows the name alone."""
    import sys

    if module is not None:
        try:
            found: Any = sys.modules.get(module) or __import__(module, fromlist=["_"])
            for part in qualname.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, Function):
            return found if timeout is None else found.options(timeout=timeout)
    return Function(None, name, {}, timeout)


def is_in_file(raw_function: Any) -> bool:
    """Whether importing its module's file brings the function back; false for lambdas, closures, what was typed into a
    prompt, and what a script defines under `if __name__ == "__main__":`.
    """
    import sys

    from mn.call import inside_sandbox

    module = sys.modules.get(raw_function.__module__)
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py") or "<" in raw_function.__qualname__:
        return False
    found: Any = module
    for part in raw_function.__qualname__.split("."):
        found = getattr(found, part, None)
    if getattr(found, "raw_function", found) is not raw_function:
        return False
    if raw_function.__module__ != "__main__" or inside_sandbox():
        return True
    from mn.scripts import is_defined_by_import

    return is_defined_by_import(raw_function, file)


def _default_name(raw_function: Callable[..., Any]) -> str:
    return raw_function.__name__.strip("<>")


if TYPE_CHECKING:

    @overload
    def function(raw_function: Callable[P, R], /) -> Function[P, R]: ...
    @overload
    def function(
        *,
        name: str | None = None,
        cpu: float | None = None,
        memory: str | int | None = None,
        gpu: int | str | None = None,
        timeout: float | str | None = None,
        retries: int | None = None,
        concurrency: int | None = None,
        min_replicas: int | None = None,
        max_replicas: int | None = None,
        idle_timeout: float | str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Callable[[Callable[P, R]], Function[P, R]]: ...


def function(
    raw_function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    cpu: float | None = None,
    memory: str | int | None = None,
    gpu: int | str | None = None,
    timeout: float | str | None = None,
    retries: int | None = None,
    concurrency: int | None = None,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    idle_timeout: float | str | None = None,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Make a function one that can run on the pool: `@mn.function`, or with settings `@mn.function(cpu=1,
    memory="512MiB")`.

    cpu: cores of one replica · memory: of one replica, in bytes or with a unit · gpu: how many · timeout: seconds (or
    `"5m"`) that a call may take · retries: times that a call may run again after it raised or its sandbox died ·
    concurrency: calls that one replica serves at once (threads, or tasks for `async def`) · min_replicas,
    max_replicas: how many there may be · idle_timeout: seconds without calls after which a replica ends · env:
    environment variables · name: what the pool calls it, the function's own name by default.
    """
    settings = {
        "cpu": cpu,
        "memory": memory,
        "gpu": gpu,
        "timeout": timeout,
        "retries": retries,
        "concurrency": concurrency,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "idle_timeout": idle_timeout,
        "env": env,
    }
    given = {key: value for key, value in settings.items() if value is not None}

    def decorate(raw: Callable[P, R]) -> Function[P, R]:
        if isinstance(raw, Function) or not hasattr(raw, "__code__"):
            raise TypeError(f"@mn.function is for functions, not for {raw!r}")
        return Function(raw, name or _default_name(raw), given)

    return decorate if raw_function is None else decorate(raw_function)


def lookup(name: str) -> Function[..., Any]:
    """A handle of a function that is deployed on the pool, by name. Nothing is deployed, and nothing is asked until a
    call.
    """
    return Function(None, name, {})
