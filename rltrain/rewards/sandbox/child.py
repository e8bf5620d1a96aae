"""The child process of the sandbox, run as a file by ``pool.py``. It imports the standard library only.

In mode ``serve`` it answers requests with a trusted function of untrusted data (the CAS). In mode ``program`` it runs
an untrusted program: namespaces and a private file system first, then the reaper (process 1), then the program. The
parent keeps the deadline, the output cap and the verdict, and does not rely on what the child says.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import itertools
import json
import os
import resource
import signal
import sys
from typing import Any

MIB = 2**20
EXIT_MEMORY = 86
MAX_ITERATED = 100_000
FIRST_FREE_USER = 1_000_000_000

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NEW_MOUNT, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_LOCKED_FLAGS = 2 | 4 | 8 | 1024 | 2048  # nosuid, nodev, noexec, noatime, nodiratime: a remount must keep them
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> None:
    if getattr(_LIBC, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when its parent dies. Exit at once if the parent is dead."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def limit(config: dict[str, Any]) -> list[str]:
    """Set the resource limits of ``config`` and name them."""
    names = ("memory_mib", "cpu_s", "processes", "file_mib")
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)
    for name, kind in zip(names, kinds, strict=True):
        value = int(config[name] * MIB) if name.endswith("_mib") else int(config[name])
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    active = ["memory", "cpu", "file size"]
    return active if os.geteuid() == 0 else [*active, "process count"]


def _map_user(user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def isolate(flags: int) -> bool:
    """Enter new namespaces, as root or in a user namespace. False if the system forbids it."""
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            _call("unshare", flags)
            return True
    except OSError:
        pass
    try:
        _call("unshare", _NEW_USER | flags)
        _map_user(user, group)
    except OSError:
        return False
    return True


# --- serve: one trusted function, untrusted data -----------------------------------------------------------------


def serve(config: dict[str, Any]) -> None:
    """Answer JSON lines ``[argument, …]`` with ``{"status": …, "value": …}`` until the input ends.

    The imports and ``prepare`` come before "ready", so that no item pays for them.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.register_at_fork(after_in_child=replies.close)  # what the function forks cannot answer a later request
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.path[:] = config["path"]
    module_name, name = config["target"].split(":")
    module = importlib.import_module(module_name)
    function = getattr(module, name)
    if config["prepare"]:
        getattr(module, config["prepare"])(*config["prepared_with"])
    active = limit(config) + (["no network"] if not config["network"] and isolate(_NEW_NET) else [])
    _reply(replies, {"status": "ready", "value": active})
    for line in sys.stdin:
        # The kernel kills the process when the item has used its processor time, even inside C code.
        signal.setitimer(signal.ITIMER_PROF, config["item_cpu_s"])
        try:
            reply = {"status": "ok", "value": function(*json.loads(line))}
        except MemoryError:
            reply = {"status": "memory", "value": None}
        except Exception as error:
            reply = {"status": "error", "value": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, reply)


def _reply(stream: Any, reply: dict[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


# --- program: untrusted code -------------------------------------------------------------------------------------


def become_nobody() -> None:
    """Change from root to a user that owns nothing and that no other process has."""
    user = FIRST_FREE_USER + os.getpid()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def library_is_public() -> bool:
    """Whether any user can read the interpreter's library."""
    folder = os.path.dirname(os.path.realpath(os.__file__))
    while folder != "/" and os.stat(folder).st_mode & 0o001:
        folder = os.path.dirname(folder)
    return folder == "/"


def _bind(source: str, root: str, *, read_only: bool = True) -> None:
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _call("mount", source.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
    if read_only:
        kept = os.statvfs(target).f_flag & _LOCKED_FLAGS
        _call("mount", None, target.encode(), None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | kept, None)


def private_root(root: str) -> None:
    """Change to a file system of the interpreter and its libraries, read-only, and an empty /tmp, without /proc."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=64m,mode=755")
    folders = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))}
    folders |= {path for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path) and not os.path.islink(path)}
    outermost = [path for path in sorted(folders) if not any(path.startswith(folder + "/") for folder in folders)]
    for path in outermost:
        _bind(path, root)
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
    for device in ("/dev/null", "/dev/urandom", "/dev/zero"):
        _bind(device, root, read_only=False)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o1777)
    os.chroot(root)
    os.chdir("/tmp")


def drop_capabilities() -> None:
    """Drop all capabilities inside the user namespace, for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def program(config: dict[str, Any]) -> int:
    """Read ``{"source", "stdin", "calls"}``, report the protections, and run the source in new namespaces."""
    request = json.loads(sys.stdin.buffer.readline())
    active: list[str] = []
    if isolate(_NEW_NET | _NEW_PID | _NEW_IPC | _NEW_MOUNT):
        active += ["no network", "own process tree"]
        reaper = os.fork()
        if reaper:
            return _wait(reaper)
        die_with_parent(None)
        try:
            private_root(config["root"])
            active.append("own file system")
        except OSError:
            pass  # not in ``active``, so the parent reports it
    if os.getuid() == 0 and ("own file system" in active or library_is_public()):
        become_nobody()
    if os.getuid() != 0:
        active.append("not root")
    drop_capabilities()
    die_with_parent(None)
    active += limit(config)
    runner = os.fork()
    if runner == 0:
        die_with_parent(None)
        _run(request, active)
    return _wait(runner)


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _run(request: dict[str, Any], active: list[str]) -> None:
    os.write(1, json.dumps({"active": active}).encode() + b"\n")
    results = os.dup(1)
    source = os.memfd_create("stdin")
    os.write(source, request["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8", errors="replace")
    if request["calls"] is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.argv = ["solution.py"]
    try:
        code = _execute(request, results)
    except MemoryError:
        code = EXIT_MEMORY
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        code = 1
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 1
    os._exit(code & 0xFF)


def _execute(request: dict[str, Any], results: int) -> int:
    calls = request["calls"]
    space: dict[str, Any] = {"__name__": "__main__" if calls is None else "solution", "__builtins__": __builtins__}
    exec(compile(request["source"], "solution.py", "exec"), space)
    for call in calls or ():
        if call["statement"]:
            exec(compile(call["text"], "test", "exec"), space)
        else:
            value = plain(eval(compile(call["text"], "test", "eval"), space))
            _write_all(results, json.dumps({"value": value}).encode() + b"\n")
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def plain(value: Any) -> Any:
    """Tagged JSON of built-in types and numpy's; of any other class, what it iterates over and its truth value."""
    if value is None or type(value) is bool:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    for name, kinds in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kinds):
            return {"t": name, "v": [plain(item) for item in value]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[plain(key), plain(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"t": "bytes", "v": value.hex()}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return {"t": "object", "v": [_iterated(value), _truth(value)]}


def _iterated(value: Any) -> list[Any] | None:
    try:
        items = list(itertools.islice(iter(value), MAX_ITERATED + 1))
        return [plain(item) for item in items] if len(items) <= MAX_ITERATED else None
    except Exception:
        return None


def _truth(value: Any) -> bool | None:
    try:
        return bool(value)
    except Exception:
        return None


def main() -> None:
    """``child.py serve|program CONFIG``."""
    mode, config = sys.argv[1], json.loads(sys.argv[2])
    die_with_parent(config["parent"])
    if mode == "serve":
        serve(config)
    else:
        os._exit(program(config))


if __name__ == "__main__":
    main()
