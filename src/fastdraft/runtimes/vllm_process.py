"""The process beside a server of vLLM: it starts it, and ends all of it when its own stdin is closed.

python -I vllm_process.py COMMAND...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Any

_GRACE_SECONDS = 10  # to free shared memory; whoever is left then is killed


def main() -> None:
    """Runs the command to its end, or to the end of whoever holds the other side of stdin."""
    linux = sys.platform == "linux"
    die = (lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)) if linux else None  # PR_SET_PDEATHSIG
    # A session of its own: the server's helpers are in its group and are killed by it.
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(sys.argv[1:], preexec_fn=die, **how)  # noqa: PLW1509 (no thread yet)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        end(0)

    def end(code: int) -> None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        os._exit(code)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = process.wait()
    end(code if code > 0 else 1)


if __name__ == "__main__":
    main()
