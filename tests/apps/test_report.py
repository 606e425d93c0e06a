"""The page of `fireq inspect --html`: it holds the numbers of --json, needs no network, and draws itself in a browser."""
import html.parser
import json
import os
import shutil
import subprocess

import browser
import export_models as em
from harness import (CALIBRATE_260K, FIREQ, INPUT, STORIES_260K, USAGE, TestCase, edit_json, fireq, fireq_json, main, read_tensors,
                     refused)

EXAMPLE = FIREQ.parent / "fireq_write_statistics_example"


class Page(html.parser.HTMLParser):
    """What a page refers to, the text of its scripts by id, attributes of <body>, rows of its tables."""

    def __init__(self, text):
        super().__init__()
        self.links, self.scripts, self.body, self.tables = [], {}, {}, {}
        self._script = self._table = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "action", "data", "poster")]
        if tag == "script":
            self._script = attributes.get("id", len(self.scripts))
            self.scripts[self._script] = ""
        elif tag == "body":
            self.body = attributes
        elif tag == "table":
            self._table = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag == "td" and self._table:
            self._table[-1].append(attributes.get("data-value"))

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None
        elif tag == "table":
            self._table = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] += data


def drawn(path):
    """The page after Chromium ran its scripts, on a desktop in light colours and on a phone in dark ones. Nothing may be said on the
    console, and nothing may look broken. With FIREQ_SHOTS=FOLDER pictures of it are left there, to be looked at."""
    with browser.Browser(path.parent / "profile") as chromium:
        for width, scheme in ((browser.PHONE, "dark"), (browser.DESKTOP, "light")):
            chromium.open(path, width, scheme=scheme)
            assert chromium.said() == [], chromium.said()
            assert chromium.value("document.documentElement.dataset.theme") == scheme
            faults = chromium.value(browser.FAULTS)
            assert faults == [], (width, faults)
        page = Page(chromium.value("document.documentElement.outerHTML"))
    assert "data-errors" not in page.body, page.body
    if os.environ.get("FIREQ_SHOTS"):
        browser.pictures(path, os.environ["FIREQ_SHOTS"])
    return page


class Report(TestCase):
    def setUp(self):
        super().setUp()
        refusal = fireq("inspect", STORIES_260K, "--html", self.tmp / "probe.html", "--layer", 0, code=None)
        if "no HTML report" in refusal.err:
            self.skipTest("this build has no HTML report (scripts/fetch-assets)")

    def packed(self):
        fireq("quantize", STORIES_260K, "-o", self.tmp / "packed", "--preset", "fast", *CALIBRATE_260K)
        return self.tmp / "packed"

    def report(self, *args):
        path = self.tmp / "report.html"
        document = fireq_json("inspect", *args, "--html", path)
        page = Page(path.read_text(encoding="utf-8"))
        self.assertEqual(json.loads(page.scripts["fireq-data"]), document)
        self.assertEqual(page.links, [])  # stands alone
        return path, document, json.loads(page.scripts["fireq-profiles"])

    def browse(self, path):
        if not browser.CHROMIUM:
            self.skipTest("no Chromium was found")
        return drawn(path)

    def expect_table(self, page, name, rows, keys, first):
        """The table shows every row, sorted by `first`, largest first."""
        shown = [r for r in page.tables[name] if r]
        ordered = sorted(rows, key=lambda r: -r[first])
        self.assertEqual(len(shown), len(rows))
        place = [i for i, _ in keys]
        for cells, row in zip(shown, ordered):
            for i, key in keys:
                if isinstance(row[key], str):
                    continue
                self.assertEqual(float(cells[i]), row[key], (name, key, row))
        self.assertEqual(sorted(c[place[0]] for c in shown), sorted(str(r[keys[0][1]]) for r in rows))

    def test_a_packed_folder_with_its_original(self):
        path, document, profiles = self.report(self.packed(), "--reference", STORIES_260K)
        self.assertEqual(len(document["linears"]), 35)
        self.assertEqual({p["site"] for p in profiles["sites"]} >= {"k_pre_rope", "k_after_n", "k_after_n_s", "down_in"}, True)
        self.assertTrue(all(s["channels"] for s in profiles["s_channels"]))
        for p in profiles["sites"]:  # small: every channel is there
            self.assertEqual((p["step"], len(p["absmax"]), len(p["rms"])), (1, p["channels"], p["channels"]))
            top = max(r["absmax"] for r in document["sites"] if (r["layer"], r["site"]) == (p["layer"], p["site"]))
            self.assertAlmostEqual(max(p["absmax"]) / top, 1, delta=0.006)
        for r in document["packed"]:
            groups = sum(r["scale_counts"])
            self.assertEqual(sum(r["absmax_histogram"]), groups)
            self.assertAlmostEqual(sum(r["scale_counts"][:8]) / groups, r["subnormal_scales"])
        page = self.browse(path)
        self.expect_table(page, "linears-table", document["linears"], [(0, "name"), (3, "rel_error"), (4, "snr_db")], "rel_error")
        self.expect_table(page, "sites-table", document["sites"], [(1, "site"), (2, "absmax"), (4, "max_over_rms"), (5, "kurtosis")],
                          "max_over_rms")
        self.expect_table(page, "packed-table", document["packed"], [(1, "name"), (6, "subnormal_scales"), (3, "largest_scale")],
                          "subnormal_without_row_scale")

    def test_a_mixed_folder_and_its_plan(self):
        """How modules are stored, against the folder's tensors; what the planner measured, against its own report."""
        model, recipe, out = self.tmp / "random", self.tmp / "recipe.json", self.tmp / "mixed"
        em.random_llama(model, 31, awkward=False)
        recipe.write_text(json.dumps({"preset": "rtn", "embeddings": "fp8", "ignore": ["model.layers.1.mlp.up_proj"],
                                      "overrides": [{"match": "*.0.*.v_proj", "precision": "fp8"}]}))
        run = ("--recipe", recipe, "--tokens", em.random_tokens(self.tmp / "ids.u32", 32, 512, 384), "--samples", 4, "--length", 64)
        least = fireq_json("quantize", model, "-o", out, *run, "--max-kl", 1000, "--dry-run")["bytes_after"]
        made = fireq_json("quantize", model, "-o", out, *run, "--target-size", least + 200_000)
        path, document, _ = self.report(out)
        sizes, kinds = {}, {}
        for name, (dtype, array) in read_tensors(out).items():
            module, _, part = name.rpartition(".")
            if not part.startswith("weight") or not ("proj" in module or module.endswith("embed_tokens")):
                continue
            sizes[module] = sizes.get(module, 0) + array.nbytes
            kinds[module] = {"weight_codes": "int4", "weight": "fp8" if dtype == "F8_E4M3" else "original"}.get(part, kinds.get(module))
        self.assertEqual({(n, kinds[n], sizes[n]) for n in kinds}, {(m["name"], m["precision"], m["bytes"]) for m in document["modules"]})
        self.assertEqual({"int4", "fp8", "original"}, set(kinds.values()))
        self.assertEqual(("fp8", "fp8", "original"), tuple(kinds[n] for n in (
            "model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj")))
        measured = {key: value for key, value in made["plan"].items() if key not in ("seconds", "result_kl")}
        self.assertEqual(measured, document["plan"])
        self.assertEqual(12, len(measured["units"]))
        page = self.browse(path)
        self.expect_table(page, "modules-table", document["modules"], [(1, "name"), (2, "precision"), (3, "bytes")], "bytes")
        rows = [{"linears": " ".join(u["linears"]), "precision": u["precision"]} |
                {f"{what}_{p}": u[what][p] for what, p in (("kl", "int4"), ("kl", "fp8"), ("bytes", "int4"), ("bytes", "fp8"), ("bytes", "original"))}
                for u in measured["units"]]
        self.expect_table(page, "plan-table", rows, [(0, "linears"), (1, "precision"), (2, "kl_int4"), (3, "kl_fp8"), (4, "bytes_int4"),
                                                     (5, "bytes_fp8"), (6, "bytes_original")], "kl_int4")
        shown = {cells[0]: cells[1] for cells in page.tables["plan-table"] if cells}
        self.assertEqual({r["linears"]: r["precision"] for r in rows}, shown)
        for change in (lambda p: p.pop("units"), lambda p: p["units"][3]["kl"].update(int4="x"), lambda p: p["units"][0].update(linears=[1]),
                       lambda p: p.update(kl=None)):
            keep = (out / "precision_plan.json").read_text()
            edit_json(out / "precision_plan.json", change)
            refused("inspect", out, code=INPUT, parts=["precision_plan.json", "key"])
            (out / "precision_plan.json").write_text(keep)

    def test_a_model_and_a_statistics_file(self):
        path, document, _ = self.report(STORIES_260K)
        self.expect_table(self.browse(path), "weights-table", document["weights"], [(1, "site"), (3, "rms")], "max_over_rms")
        fireq("calibrate", STORIES_260K, "-o", self.tmp / "s.h5", *CALIBRATE_260K)
        path, document, _ = self.report(self.tmp / "s.h5", "--layer", 3)
        self.assertEqual({r["layer"] for r in document["sites"]}, {3})
        self.expect_table(self.browse(path), "sites-table", document["sites"], [(1, "site"), (3, "rms")], "max_over_rms")

    def test_names_cannot_break_out_of_the_page(self):
        hostile = self.tmp / "</script><script>document.title='x'<!-- & {{data}}"
        hostile.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(STORIES_260K, hostile)
        path, document, _ = self.report(hostile, "--layer", 0)
        self.assertEqual(document["target"], str(hostile))
        self.browse(path)

    def test_the_size_of_a_70b_model(self):
        if not EXAMPLE.exists():
            self.skipTest("fireq_write_statistics_example was not built")
        subprocess.run([EXAMPLE, self.tmp / "large.h5", "70B"], check=True)
        path, document, profiles = self.report(self.tmp / "large.h5")
        self.assertEqual(len(document["sites"]), 80 * 10)
        self.assertLess(path.stat().st_size, 15_000_000)
        wide = [p for p in profiles["sites"] if p["site"] == "down_in"]
        self.assertEqual([p["channels"] for p in wide], [28672] * 80)
        for p in wide[:3]:  # neighbours share a point, none is lost
            top = max(r["absmax"] for r in document["sites"] if (r["layer"], r["site"]) == (p["layer"], "down_in"))
            self.assertAlmostEqual(max(p["absmax"]) / top, 1, delta=0.006)
        page = self.browse(path)
        print(f"80 layers x 28672 channels: {path.stat().st_size} bytes, drawn after {page.body['data-milliseconds']} ms")
        if os.environ.get("FIREQ_TIMED"):  # a busy machine says nothing about three seconds
            self.assertLess(int(page.body["data-milliseconds"]), 3000)

    def test_refusals(self):
        refused("inspect", STORIES_260K, "--reference", STORIES_260K, "--html", self.tmp / "x.html", code=USAGE,
                parts=["--reference", "FireQ folder"])
        refused("inspect", STORIES_260K, "--html", self.tmp / "nowhere/x.html", code=None, parts=["nowhere/x.html"])
        self.assertFalse((self.tmp / "x.html").exists())


if __name__ == "__main__":
    main()
