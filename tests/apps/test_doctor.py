"""fireq doctor: every field against the machine itself, and against machines that the test makes up."""
import json
import os
import re
import shutil
import struct
import subprocess
import unittest
from pathlib import Path

from export_models import random_tokens
from harness import ENVIRONMENT, TestCase, fireq, fireq_json, main, refused

SHAPES = {  # hidden, ffn, layers, heads, KV heads, head size
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64), "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128), "Qwen3-32B": (5120, 25600, 64, 64, 8, 128),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128), "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128)}
VOCABULARIES = {"SmolLM2-135M": 49152, "Qwen3-32B": 151936}
OTHER_VOCABULARY = 128256

CPUINFO = """processor\t: {i}
vendor_id\t: GenuineTest
model name\t: Imaginary CPU 9000 @ 3.00GHz
flags\t\t: fpu sse4_2 avx fma f16c avx2 avx512fake avx512f erms

"""

FAKE_CUDA = r"""
#include <stddef.h>
#include <string.h>
static const int capability[] = {CAPABILITIES};
#define COUNT ((int)(sizeof(capability) / sizeof(*capability)))
int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuGetErrorName(int e, const char **s) { *s = e == 100 ? "CUDA_ERROR_NO_DEVICE" : "OTHER"; return 0; }
int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return i < COUNT ? 0 : 101; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "Test GPU ?", n); s[9] = (char)('0' + d); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  if (a != 75 && a != 76 && a != 16) return 1;
  *v = a == 75 ? capability[d] / 10 : a == 76 ? capability[d] % 10 : 77;
  return 0;
}
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = 80000000000u + (size_t)d; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strncpy(s, "555.44.33", n); return 0; }
int nvmlShutdown(void) { return 0; }
"""


def writing(shape, vocab, windows=10, length=2048):
    """What preset best needs while the model writes its text, beside its layers: docs/recipes.md, "What best does"."""
    hidden, ffn, layers, heads, kv_heads, head = shape
    matrices = 4 * layers * hidden * (2 * heads * head + 2 * kv_heads * head + 3 * ffn)
    output = 4 * vocab * hidden
    cache = 4 * layers * length * kv_heads * (2 * head + 2)
    rows = min(windows, max(1, 2**32 // cache))
    prompt = length // 16 * 4 * (hidden + 2 * heads * head + 2 * kv_heads * head)
    return matrices + output + rows * (cache + prompt + 16 * vocab) if matrices + output <= 2**32 else 0


def peak(shape, vocab, best, tokens=10 * 2048):
    """The bound of docs/forward-pass.md, "Memory", and what preset best adds."""
    hidden, ffn, layers, heads, kv_heads, head = shape
    layer = 4 * hidden * (2 * heads * head + 2 * kv_heads * head + 3 * ffn)
    if not best:
        return 2 * layer + 4 * tokens * hidden + 200_000_000
    widest = max(hidden, heads * head, ffn)
    # docs/recipes.md, "What best does": the gradients of 16,384 tokens, and rounding two linears at a time.
    outputs = (16384 * hidden * (2 * layers + 12) +
               4 * sum(n * n for n in (heads * head, kv_heads * head, kv_heads * head, hidden, ffn, ffn, hidden)) +
               2 * widest * (16 * widest + 20 * hidden + 16384))
    # As many windows again are the model's own text, where it writes any.
    own = writing(shape, vocab)
    streams = (2 if own else 1) * tokens * (8 * hidden + widest) + 24 * widest**2 + outputs
    return 4 * layer + max(streams, own) + 200_000_000


class Doctor(TestCase):
    def verdict(self, report, what):
        found = [v for v in report["verdicts"] if v["what"].startswith(what)]
        self.assertEqual(1, len(found), report["verdicts"])
        return found[0]

    def machine(self, processors=3, available_kb=12_000_000, group=None):
        """proc/ and sys/ of a machine that does not exist."""
        root = self.tmp / "machine"
        (root / "proc/self").mkdir(parents=True, exist_ok=True)
        (root / "proc/cpuinfo").write_text("".join(CPUINFO.format(i=i) for i in range(processors)))
        (root / "proc/meminfo").write_text(f"MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   {available_kb} kB\n")
        (root / "proc/self/cgroup").write_text("0::/a/b\n")
        for folder, files in (group or {}).items():
            (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (root / "sys/fs/cgroup" / folder / name).write_text(text)
        return root

    def libraries(self, name, source):
        """A folder for LD_LIBRARY_PATH with `source` compiled as libcuda and NVML."""
        if not shutil.which("cc"):
            self.skipTest("no C compiler was found")
        folder = self.tmp / name
        folder.mkdir()
        (folder / "fake.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "fake.c"], check=True)
        shutil.copy(folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")
        return {"LD_LIBRARY_PATH": str(folder)}

    def test_this_machine(self):
        report = fireq_json("doctor", cwd=self.tmp)
        self.assertEqual({"version", "build", "cpu", "memory", "disk", "gpu", "libraries", "models", "verdicts", "warnings", "warning_lines"}, set(report))
        version = fireq("--version").out
        self.assertIn(report["version"], version)
        for name, present in report["build"].items():
            self.assertRegex(version, rf"{'with' if present else 'without'}: .*{re.escape(name)}")
        cpuinfo = Path("/proc/cpuinfo").read_text()
        flags = set(re.search(r"^(?:flags|Features)\s*: (.*)", cpuinfo, re.M)[1].split())
        self.assertLessEqual(set(report["cpu"]["features"]), flags)
        self.assertEqual("avx2" in flags, "avx2" in report["cpu"]["features"])
        self.assertEqual(len(re.findall(r"^processor", cpuinfo, re.M)), report["cpu"]["processors"])
        self.assertEqual(len(os.sched_getaffinity(0)), report["cpu"]["usable"])
        if report["build"]["vectorised loops"] and "avx2" in flags:
            self.assertIn(report["cpu"]["loops"]["forward"], ("AVX2", "AVX3"))
        total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        self.assertEqual(total, report["memory"]["total"])
        self.assertLess(0, report["memory"]["available"])
        self.assertLessEqual(report["memory"]["available"], total)
        self.assertLess(abs(shutil.disk_usage(self.tmp).free - report["disk"]["free"]), 2e9)
        self.assertIn("OpenBLAS", report["libraries"]["openblas"])
        self.assertTrue(report["disk"]["writable"])
        for verdict in report["verdicts"]:
            self.assertIn(verdict["verdict"], ("yes", "partly", "no"))
            self.assertTrue(verdict["detail"])
            self.assertEqual(verdict["verdict"] == "yes", not verdict["todo"], verdict)
        text = fireq("doctor", cwd=self.tmp).out
        for verdict in report["verdicts"]:
            self.assertRegex(text, rf"(?m)^{verdict['verdict']} +{re.escape(verdict['what'])} ")

    def test_the_memory_model(self):
        """Each shape's figures by the documented formula, and which of them fit."""
        for kb in (500, 400_000, 12_000_000, 10**9):
            report = fireq_json("doctor", "--root", self.machine(available_kb=kb))
            self.assertEqual(list(SHAPES), [m["name"] for m in report["models"]])
            self.assertEqual(kb * 1024, report["memory"]["available"])
            for model in report["models"]:
                for preset in ("fast", "best"):
                    expected = peak(SHAPES[model["name"]], VOCABULARIES.get(model["name"], OTHER_VOCABULARY),
                                    preset == "best")
                    self.assertEqual(expected, model[preset]["memory"], (model["name"], preset))
                    self.assertEqual(expected <= kb * 1024, model[preset]["fits"])
            fits = [m["name"] for m in report["models"] if m["fast"]["fits"]]
            verdict = self.verdict(report, "quantize (rtn")
            self.assertEqual("no" if not fits else "yes" if len(fits) == len(SHAPES) else "partly", verdict["verdict"])
            if fits:
                self.assertIn(f"up to {fits[-1]} ", verdict["detail"])

    def test_figures_are_those_of_a_dry_run(self):
        """Against quantize --dry-run on a model of the shape: 16 GB of zeros that take no space."""
        hidden, ffn, layers, heads, kv_heads, head = SHAPES["Llama-3.1-8B"]
        shapes = {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden), "model.norm.weight": (hidden,)}
        for i in range(layers):
            for name, shape in (("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)),
                                ("self_attn.q_proj", (heads * head, hidden)), ("self_attn.k_proj", (kv_heads * head, hidden)),
                                ("self_attn.v_proj", (kv_heads * head, hidden)), ("self_attn.o_proj", (hidden, heads * head)),
                                ("mlp.gate_proj", (ffn, hidden)), ("mlp.up_proj", (ffn, hidden)), ("mlp.down_proj", (hidden, ffn))):
                shapes[f"model.layers.{i}.{name}.weight"] = shape
        model, header, end = self.tmp / "model", {}, 0
        model.mkdir()
        for name, shape in shapes.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with open(model / "model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
        (model / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu"}))
        ids = random_tokens(self.tmp / "ids.u32", 1, 30000, 128256)
        expected = next(m for m in fireq_json("doctor")["models"] if m["name"] == "Llama-3.1-8B")
        for preset in ("fast", "best"):
            plan = fireq_json("quantize", model, "-o", self.tmp / "out", "--preset", preset, "--tokens", ids, "--dry-run",
                              "--no-measure")
            self.assertEqual(plan["peak_memory"], expected[preset]["memory"])
        plan = fireq_json("quantize", model, "-o", self.tmp / "out", "--preset", "rtn", "--dry-run")
        self.assertLess(abs(plan["bytes_after"] / expected["output"] - 1), 1e-3)

    def test_processor_and_control_group(self):
        root = self.machine(group={"a/b": {"memory.max": "max\n", "cpu.max": "max 100000\n"},
                                   "a": {"memory.max": "3000000000\n", "memory.current": "1000000000\n", "cpu.max": "150000 100000\n"}})
        report = fireq_json("doctor", "--root", root)
        self.assertEqual("Imaginary CPU 9000 @ 3.00GHz", report["cpu"]["name"])
        self.assertEqual(3, report["cpu"]["processors"])
        self.assertEqual(["sse4_2", "avx", "f16c", "fma", "avx2", "avx512f"], report["cpu"]["features"])
        self.assertEqual(1.5, report["cpu"]["quota"])
        self.assertEqual({"total": 16_000_000 * 1024, "available": 2_000_000_000, "limit": 3_000_000_000}, report["memory"])
        text = fireq("doctor", "--root", root).out
        for part in ("Imaginary CPU", "3 processors", "1.5 by the control group", "2.0 GB free within the control group's 3.0 GB"):
            self.assertIn(part, text)
        # Nothing to read at all: said, not guessed.
        report = fireq_json("doctor", "--root", self.tmp / "nowhere")
        self.assertEqual(("", [], 0), (report["cpu"]["name"], report["cpu"]["features"], report["memory"]["available"]))
        self.assertEqual("no", self.verdict(report, "quantize (rtn")["verdict"])

    def test_gpus_that_do_not_exist(self):
        built = fireq_json("doctor")["build"]["CUDA kernels"]
        for capabilities, kernels, served in (([90], (True, True, True), True), ([80], (False, True, False), True),
                                              ([89], (False, True, True), True), ([103], (False, True, True), True),
                                              ([75], (False, False, False), False), ([120], (False, False, False), False),
                                              ([75, 90], (False, False, False), True)):
            with self.subTest(capabilities):
                source = FAKE_CUDA.replace("CAPABILITIES", ", ".join(map(str, capabilities))).replace("INIT", "0")
                env = self.libraries("_".join(map(str, capabilities)), source)
                report = fireq_json("doctor", env=env)
                gpu = report["gpu"]
                self.assertEqual((True, "555.44.33", "12.8", ""),
                                 (gpu["driver_found"], gpu["driver_version"], gpu["cuda_version"], gpu["problem"]))
                self.assertEqual([{"name": f"Test GPU {i}", "compute_capability": f"{c // 10}.{c % 10}", "multiprocessors": 77,
                                   "memory": 80_000_000_000 + i} for i, c in enumerate(capabilities)],
                                 [{k: d[k] for k in d if k != "kernels"} for d in gpu["devices"]])
                found = gpu["devices"][0]["kernels"]
                self.assertEqual(kernels, (found["hopper"], found["portable"], found["cublas"]))
                verdict = self.verdict(report, "--device cuda")
                self.assertEqual(verdict["verdict"], "no" if not (served and built) else "yes" if len(capabilities) == 1 else "partly")
                self.assertIn("FIREQ_WITH_CUDA" if served and not built else "FIREQ_CUDA_ARCHITECTURES" if not served else "",
                              verdict["todo"])
                self.assertIn(f"compute capability {capabilities[0] // 10}.{capabilities[0] % 10}", fireq("doctor", env=env).out)

    def test_drivers_that_fail(self):
        env = self.libraries("none", FAKE_CUDA.replace("CAPABILITIES", "90").replace("INIT", "100"))
        report = fireq_json("doctor", env=env)
        self.assertIn("CUDA_ERROR_NO_DEVICE", report["gpu"]["problem"])
        self.assertEqual([], report["gpu"]["devices"])
        self.assertIn("CUDA_ERROR_NO_DEVICE", self.verdict(report, "--device cuda")["detail"])
        env = self.libraries("empty", "int cuInit(unsigned f) { return (int)f; }\n")
        self.assertIn("lacks functions", fireq_json("doctor", env=env)["gpu"]["problem"])

    def test_a_broken_library_is_a_failure(self):
        """OpenBLAS is part of an installation: without it preset best cannot run, and doctor says so."""
        folder = self.tmp / "broken"
        folder.mkdir()
        (folder / "libopenblas.so.0").write_bytes(b"this is no library")
        env = {"LD_LIBRARY_PATH": str(folder)}
        refused("doctor", "--quiet", code=ENVIRONMENT, env=env, parts=["quantize (best)", "OpenBLAS", "libopenblas0-pthread"])
        report = fireq_json("doctor", env=env, code=ENVIRONMENT)
        self.assertEqual("", report["libraries"]["openblas"])
        self.assertIn("libopenblas.so.0", report["libraries"]["openblas_problem"])
        self.assertEqual("no", self.verdict(report, "quantize (best)")["verdict"])

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_a_folder_that_cannot_be_written(self):
        self.tmp.chmod(0o555)
        verdict = self.verdict(fireq_json("doctor", cwd=self.tmp), "output")
        self.tmp.chmod(0o755)
        self.assertEqual("no", verdict["verdict"])


if __name__ == "__main__":
    main()
