# SPDX-License-Identifier: Apache-2.0
"""Processes of their own for scripts that need NeMo, without the twenty seconds that importing NeMo takes in each.

``conftest.py`` starts two servers for a test run, one with the patches and one with stock NeMo. A server imports NeMo
at its first request, and forks for each script. So a script shares nothing with the tests (no module, random number or
thread), and nothing with the scripts before it. A server ends when its standard input does.

    python fresh_process.py DESCRIPTOR     # a server, with a listening socket; NEMO_STREAMING_SSL=0: with stock NeMo
"""

import atexit
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

FOLDER = 'NEMO_STREAMING_SSL_TEST_SERVERS'  # the environment variable with the folder of the sockets


def start_servers() -> list[subprocess.Popen]:
    """Start a server of each kind, and tell this process and its children where they are."""
    os.environ[FOLDER] = tempfile.mkdtemp(prefix='nemo-servers-')
    return [_start_server(patched) for patched in (True, False)]


def _start_server(patched: bool) -> subprocess.Popen:
    with socket.socket(socket.AF_UNIX) as listener, open(_path_of(patched, 'log'), 'w') as log:
        listener.bind(_path_of(patched, 'socket'))
        listener.listen()
        return subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, 'NEMO_STREAMING_SSL': '1' if patched else '0', 'OMP_NUM_THREADS': '1'},
        )


def end_servers(servers: list[subprocess.Popen]) -> None:
    """End the servers, and remove what they have left."""
    for server in servers:
        server.stdin.close()
        server.wait()
    shutil.rmtree(os.environ.pop(FOLDER))


def run_python(*arguments, patched=True, cwd=None, input=None, timeout=900, **environment):
    """Run ``python ARGUMENTS`` where NeMo is imported already.

    Args:
        arguments: a script, ``-c`` and code, or ``-m`` and a module; then its arguments.
        patched: with the patches, or else with stock NeMo.
        cwd: the folder to run in.
        input: bytes for the standard input.
        timeout: seconds after which the process is killed, with its children.
        environment: what to add to the environment variables.

    Returns:
        ``subprocess.CompletedProcess`` with the exit status (negative: a signal), and the output as text.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds.
        RuntimeError: if NeMo cannot be imported, with the reason.
    """
    command = [str(argument) for argument in arguments]
    variables = {**os.environ, **environment, 'NEMO_STREAMING_SSL': '1' if patched else '0'}
    request = dict(arguments=command, cwd=str(cwd or os.getcwd()), environment=variables)
    reading, writing = os.pipe()
    with (
        socket.socket(socket.AF_UNIX) as connection,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        connection.connect(_path_of(patched, 'socket'))
        socket.send_fds(connection, [b'.'], [reading, output.fileno(), errors.fileno()])
        connection.sendall(json.dumps(request).encode() + b'\n')
        os.close(reading)
        threading.Thread(target=_write, args=(writing, input or b'')).start()
        answers = connection.makefile()
        group = answers.readline()
        if not group:
            raise RuntimeError(f"the server has ended:\n{Path(_path_of(patched, 'log')).read_text()}")
        connection.settimeout(timeout)
        try:
            status = int(answers.readline())
        except TimeoutError:
            os.killpg(int(group), signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout) from None
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read().decode(errors='replace'))
    return subprocess.CompletedProcess(command, status, *printed)


def _path_of(patched: bool, what: str) -> str:
    return os.path.join(os.environ[FOLDER], f"{'patched' if patched else 'stock'}.{what}")


def _write(descriptor: int, content: bytes) -> None:
    """Write all to a pipe, as far as it is read, and close it."""
    try:
        with open(descriptor, 'wb') as pipe:
            pipe.write(content)
    except BrokenPipeError:
        pass


def _serve(listener: socket.socket) -> dict:
    """Answer requests until the test run ends; returns a request, in the process that is to fulfil it."""
    watching = []
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        watching = [child for child in watching if os.waitpid(child, os.WNOHANG)[0] == 0]
        if sys.stdin in ready:
            for child in watching:
                os.waitpid(child, 0)
            sys.exit()
        connection, _ = listener.accept()
        with connection, connection.makefile() as lines:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
            request = json.loads(lines.readline())
            import nemo.collections.asr.models  # noqa: F401  (the twenty seconds, once)

            watching.append(os.fork())
            if watching[-1] == 0:
                child = os.fork()
                if child != 0:
                    _watch(child, connection, descriptors)
                os.setsid()
                for standard, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, standard)
            for descriptor in descriptors:
                os.close(descriptor)
        if os.getpid() != SERVER:
            return request


def _watch(child: int, connection: socket.socket, descriptors: list[int]) -> None:
    """Tell the client a process group and, when its process has ended, the status; does not return."""
    try:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f'{child}\n'.encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f'{status}\n'.encode())
    finally:
        os._exit(0)


def _fulfil(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Do what ``python ARGUMENTS`` does after its start."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.modules['numpy'].random.seed()
    if left_out := sys.modules.get('nemo.utils.left_out'):  # a file of its own, as in a process that imports it
        left_out.LEFT_OUT.__init__()
    sys.path[:0] = ['', *filter(None, environment.get('PYTHONPATH', '').split(os.pathsep))]
    if arguments[0] == '-c':
        sys.argv = ['-c', *arguments[2:]]
        main = sys.modules['__main__'] = type(sys)('__main__')
        exec(compile(arguments[1], '<string>', 'exec'), main.__dict__)
    elif arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name='__main__')


def _end_after(request: dict) -> None:
    """Fulfil a request and end as the interpreter does, but for C++: libraries wait there for threads that a fork lacks."""
    status = 0
    try:
        _fulfil(**request)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if status and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    SERVER = os.getpid()
    del sys.path[0]  # the tests' folder
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        asked = _serve(requests)
    _end_after(asked)
