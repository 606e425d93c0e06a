"""`cmake --install`, the CMake package, pkg-config and the Debian packages: another project builds against them."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "apps"))
import oracle  # noqa: E402
from harness import STORIES_260K, read_tensors  # noqa: E402

BUILD = Path(os.environ["FIREQ_BUILD"])
os.environ["CMAKE_GENERATOR"] = "Ninja"  # what the project's own scripts install; make may not be there
TENSOR = "model.layers.1.mlp.down_proj.weight"


def run(*command, **kw):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls._tmp = tempfile.TemporaryDirectory()
        cls.tmp = Path(cls._tmp.name)
        run("cmake", "--install", BUILD, "--prefix", cls.tmp / "prefix")
        cls.prefix = cls.tmp / "prefix"

    @classmethod
    def tearDownClass(cls):
        cls._tmp.cleanup()

    def expect_consumer(self, program):
        said = run(program, STORIES_260K, TENSOR)
        tensor = read_tensors(STORIES_260K)[TENSOR]
        codes, sigma, r = oracle.quantise_rtn_rows(oracle.to_float(*tensor))
        rows, columns = tensor[1].shape
        self.assertIn(f"{rows} x {columns}", said)
        scale = np.repeat(sigma, oracle.GROUP, axis=1)[:, :columns]
        magnitudes = codes[:, :columns] & 7  # the sign makes no difference to a norm
        values = oracle.rn8(magnitudes * scale) * r[:, None]
        self.assertAlmostEqual(float(re.search(r"norm\^2 (\S+)", said)[1]) / float((values**2).sum()), 1, delta=1e-6)
        wrong = subprocess.run([program, STORIES_260K / "nowhere", TENSOR], stderr=subprocess.PIPE, text=True)
        self.assertNotEqual(wrong.returncode, 0)
        self.assertIn("nowhere", wrong.stderr)

    def test_cmake_package(self):
        run("cmake", "-S", HERE / "consumer", "-B", self.tmp / "cmake", f"-DCMAKE_PREFIX_PATH={self.prefix}",
            "-DCMAKE_BUILD_TYPE=Release")
        run("cmake", "--build", self.tmp / "cmake")
        self.expect_consumer(self.tmp / "cmake/consumer")
        refusal = subprocess.run(["cmake", "-S", HERE / "consumer", "-B", self.tmp / "later", f"-DCMAKE_PREFIX_PATH={self.prefix}",
                                  "-DWANTED=9.0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertNotEqual(refusal.returncode, 0)
        self.assertIn("9.0", refusal.stdout)

    def test_pkg_config(self):
        folder = next(self.prefix.rglob("fireq.pc")).parent
        env = dict(os.environ, PKG_CONFIG_PATH=str(folder))
        flags = run("pkg-config", "--cflags", "--libs", "fireq", env=env).split()
        compile_flags = [f for f in flags if f.startswith(("-I", "-std"))]
        link_flags = [f for f in flags if f not in compile_flags]
        run("g++", *compile_flags, "-O1", HERE / "consumer/main.cpp", "-o", self.tmp / "by_pkg_config", *link_flags)
        self.expect_consumer(self.tmp / "by_pkg_config")
        self.assertEqual(run("pkg-config", "--modversion", "fireq", env=env).strip(),
                         run(self.prefix / "bin/fireq", "--version").split()[1])

    def test_each_header_stands_alone(self):
        headers = sorted((self.prefix / "include/fireq").rglob("*.hpp"))
        self.assertGreater(len(headers), 20)
        source = self.tmp / "header.cpp"
        for header in headers:
            source.write_text(f'#include "{header.relative_to(self.prefix / "include/fireq")}"\n')
            run("g++", "-std=c++20", "-fsyntax-only", "-I", self.prefix / "include/fireq", source)

    def test_the_installed_command_runs(self):
        said = run(self.prefix / "bin/fireq", "inspect", STORIES_260K, "--layer", 0, env={"PATH": "/usr/bin:/bin"})
        self.assertIn("layers.0.mlp.down_proj", said)

    def test_debian_packages(self):
        for tool in ("cpack", "dpkg-deb", "dpkg-shlibdeps"):
            if not shutil.which(tool):
                self.skipTest(f"{tool} was not found")
        out = self.tmp / "packages"
        run("cpack", "-G", "DEB", "-B", out, cwd=BUILD)
        packages = sorted(p.name.split("_")[0] for p in out.glob("*.deb"))
        self.assertEqual(packages, ["fireq", "libfireq-dev"])
        main, development = (next(out.glob(f"{name}_*.deb")) for name in ("fireq", "libfireq-dev"))
        depends = run("dpkg-deb", "--field", main, "Depends")
        for library in ("libc6", "libhdf5", "libopenblas"):
            self.assertIn(library, depends)
        run("dpkg-deb", "--extract", main, self.tmp / "root")
        files = {str(p.relative_to(self.tmp / "root")) for p in (self.tmp / "root").rglob("*") if p.is_file()}
        self.assertIn("usr/bin/fireq", files)
        self.assertFalse([f for f in files if f.endswith((".a", ".hpp"))])
        self.assertIn("fireq", run(self.tmp / "root/usr/bin/fireq", "--version"))
        self.assertIn("libfireq_libquant.a", run("dpkg-deb", "--contents", development))


if __name__ == "__main__":
    unittest.main(verbosity=2)
