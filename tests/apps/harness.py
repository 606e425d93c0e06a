"""What the end-to-end tests share: running the fireq command, reading its files, damaging them, skipping.

Each test_GROUP.py is one ctest entry, cli.GROUP (CMakeLists.txt). By hand:

    FIREQ=build/release/bin/fireq python3 tests/apps/test_quantize.py -v [Class.test]

Exit codes of a group: 0 passed, 1 failed, 77 everything in it was skipped.
"""
import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# Absolute: tests run commands in other folders.
FIREQ = Path(os.environ.get("FIREQ", ROOT / "build/release/bin/fireq")).absolute()
DATA = Path(os.environ.get("FIREQ_DATA", ROOT / "build/data")).absolute()
STORIES_15M = DATA / "models/stories15M"
STORIES_260K = DATA / "models/stories260K"
STORIES_260K_BF16 = DATA / "models/stories260K-bf16"
TINY = DATA / "text/tinystories_train_head_944k.txt"
GRIMM = DATA / "text/grimms_fairy_tales.txt"
WIKI = DATA / "text/wiki.test.raw"

# Kinds of exit codes, docs/errors.md.
TOLERANCE, USAGE, INPUT, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 4, 130

# A short calibration for the small model.
CALIBRATE_260K = ("--text", TINY, "--skip-chars", 300000, "--max-chars", 20000, "--samples", 8, "--length", 128)
# Enough for `best` to tune codes together.
TUNE_260K = ("--samples", 32, "--length", 128, "--text", TINY, "--skip-chars", 300000, "--max-chars", 20000)


@dataclass
class Result:
    command: str
    code: int
    out: str
    err: str
    seconds: float

    def __str__(self):
        return f"$ {self.command}\nexit {self.code}\n--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-3000:]}"


def arguments(args):
    return [str(FIREQ), *map(str, args)]


def environment(extra=None):
    env = dict(os.environ, LC_ALL="C.UTF-8")
    env.pop("OMP_NUM_THREADS", None)
    env.update(extra or {})
    return env


def sanitized():
    """Whether the program was built with sanitizers, whose shadow and quarantine dwarf its own memory."""
    done = subprocess.run(arguments(["--version"]), stdout=subprocess.PIPE, env=environment(), check=True)
    return b"sanitizers" in done.stdout


def fireq(*args, code=0, timeout=600, env=None, cwd=None, user=None):
    """Runs fireq without a terminal; the exit code must be `code` (None: any that docs/errors.md knows)."""
    command = arguments(args)
    begin = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment(env), cwd=cwd, timeout=timeout, user=user)
    result = Result(" ".join(command), done.returncode, done.stdout.decode("utf-8", "replace"),
                    done.stderr.decode("utf-8", "replace"), time.monotonic() - begin)
    if code is None:
        assert done.returncode in (0, 1, 2, 3, 4, 130), result
    else:
        assert done.returncode == code, f"exit code {code} expected\n{result}"
    return result


def start(*args, **kw):
    """Starts fireq in a process group of its own and returns the Popen."""
    return subprocess.Popen(arguments(args), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(), start_new_session=True, **kw)


def refused(*args, code, parts=(), absent=(), **kw):
    """fireq must fail, with `code` unless None, and say so in one line that has every part. Returns the line."""
    result = fireq(*args, code=code, **kw)
    assert result.code != 0, f"a failure expected\n{result}"
    lines = [line for line in result.err.splitlines() if line.strip() and not line.startswith("fireq: warning:")]
    assert len(lines) == 1, f"one line on stderr expected, not {len(lines)}\n{result}"
    line = lines[0]
    for part in parts:
        assert str(part).lower() in line.lower(), f"'{part}' expected in the message\n{result}"
    for part in absent:
        assert str(part).lower() not in line.lower(), f"'{part}' not expected in the message\n{result}"
    assert result.err.endswith("\n"), result
    return line


def fireq_json(*args, **kw):
    """Runs fireq with --json FILE and returns the parsed file."""
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "report.json"
        fireq(*args, "--json", path, **kw)
        return parse_json(path)


def has_gpu():
    return Path("/dev/nvidiactl").exists()


def parse_json(path):
    """Strict: no NaN, no duplicate key, UTF-8, a newline at the end."""
    def no_constant(name):
        raise AssertionError(f"{path}: {name} is not JSON")

    def no_twins(pairs):
        keys = [key for key, _ in pairs]
        assert len(set(keys)) == len(keys), f"{path}: duplicate keys in {keys}"
        return dict(pairs)

    text = Path(path).read_bytes().decode("utf-8")
    assert text.endswith("\n"), f"{path} does not end with a newline"
    return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_twins)


# --- files -------------------------------------------------------------------------------------------------

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1", "I64": "<i8", "I32": "<i4"}


def read_header(path):
    """(header, offset of the data) of a safetensors file."""
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        return json.loads(f.read(length)), 8 + length


def shards(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def read_tensors(folder):
    """name -> (dtype name, numpy array) of all shards."""
    tensors = {}
    for path in shards(folder):
        header, start_of_data = read_header(path)
        blob = path.read_bytes()
        for name, info in header.items():
            if name == "__metadata__":
                continue
            assert name not in tensors, f"{name} is in two shards"
            begin, end = info["data_offsets"]
            array = np.frombuffer(blob[start_of_data + begin:start_of_data + end], DTYPES[info["dtype"]])
            tensors[name] = (info["dtype"], array.reshape(info["shape"]))
    return tensors


def write_safetensors(path, tensors):
    """tensors: name -> (dtype name, array)."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def location(folder, name):
    """(path, first byte, one past the last byte) of a tensor within its shard."""
    for path in shards(folder):
        header, start_of_data = read_header(path)
        if name in header:
            begin, end = header[name]["data_offsets"]
            return path, start_of_data + begin, start_of_data + end
    raise KeyError(name)


def flip(path, byte, bit=0):
    with open(path, "r+b") as f:
        f.seek(byte)
        value = f.read(1)[0]
        f.seek(byte)
        f.write(bytes([value ^ (1 << bit)]))


def poke(path, byte, data):
    with open(path, "r+b") as f:
        f.seek(byte)
        f.write(data)


def edit_json(path, change):
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value, indent=2) + "\n")


def digest(folder):
    """Relative path -> SHA-256 of every file below folder."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def copy_model(source, target):
    shutil.copytree(source, target)
    for path in Path(target).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Path(target)


# --- test cases --------------------------------------------------------------------------------------------

class TestCase(unittest.TestCase):
    """A folder of its own for each test, self.tmp; one shared by the class, self.shared."""

    @classmethod
    def setUpClass(cls):
        cls._shared = tempfile.TemporaryDirectory(prefix="fireq-shared-")
        cls.shared = Path(cls._shared.name)

    @classmethod
    def tearDownClass(cls):
        cls._shared.cleanup()

    def setUp(self):
        self._tmp = tempfile.TemporaryDirectory(prefix="fireq-test-")
        self.tmp = Path(self._tmp.name)
        self.addCleanup(self._tmp.cleanup)
        begin = time.monotonic()
        self.addCleanup(lambda: print(f"({time.monotonic() - begin:.1f} s)", end=" ", file=sys.stderr))

    @classmethod
    def quantised(cls, name, model, *args):
        """The folder of `quantize model args`, made once per class."""
        out = cls.shared / name
        if not out.exists():
            fireq("quantize", model, "-o", out, "--quiet", *args)
        return out

    def assert_same_folder(self, a, b):
        left, right = digest(a), digest(b)
        self.assertEqual(sorted(left), sorted(right))
        self.assertEqual([], [name for name in left if left[name] != right[name]], "files that differ")

    def assert_nothing_published(self, out):
        self.assertFalse(Path(out).exists(), f"{out} must not exist")


@contextlib.contextmanager
def tmpfs(size, folder):
    """A file system of `size` bytes at folder; skips the test when this process may not mount."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "fireq-test", str(folder)],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise unittest.SkipTest("mounting a small tmpfs needs root: " + done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def stop_group(process, how=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def main():
    """unittest.main with ctest's skip code."""
    if not FIREQ.exists():
        sys.exit(f"{FIREQ} is not built")
    # A shell starts what it puts into the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program = unittest.main(module="__main__", exit=False, verbosity=2)
    result = program.result
    for test, reason in result.skipped:
        print(f"SKIP: {reason}")
    if result.failures or result.errors or result.unexpectedSuccesses:
        sys.exit(1)
    sys.stdout.flush()
    sys.exit(77 if result.skipped and len(result.skipped) >= result.testsRun else 0)
