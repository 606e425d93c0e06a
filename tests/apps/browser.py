"""A page in headless Chromium at a width of one's choosing, over the DevTools pipe: what it says, how wide it is, a picture of it.

`--window-size` alone is no phone: Chromium's windows are at least 500 pixels wide. By hand, for pictures to look at:

    tests/apps/browser.py report.html FOLDER     # desktop and phone, light and dark
"""
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESKTOP, PHONE = 1400, 390


class Browser:
    """Its pipe carries JSON messages that end with a zero byte: commands on descriptor 3, answers and events on 4."""

    def __init__(self, profile):
        command_in, self._out = os.pipe()
        self._in, answers_out = os.pipe()

        def descriptors():  # not pass_fds: the numbers must be these two
            os.dup2(command_in, 1003)
            os.dup2(answers_out, 1004)
            os.dup2(1003, 3)
            os.dup2(1004, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=descriptors, close_fds=False)
        os.close(command_in)
        os.close(answers_out)
        self._rest, self._number, self.events, self._session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(OSError, RuntimeError):
            self._session = None
            self.call("Browser.close", patience=10)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self, deadline):
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]:
                raise RuntimeError("Chromium does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has gone")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, patience=120, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + patience
        while True:
            answer = self._read(deadline)
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            return answer["result"]

    def value(self, expression):
        """Of a JavaScript expression, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def open(self, path, width, height=900, scheme="light", patience=120):
        """Loads the page and waits until it says that it is drawn."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 640)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        end = time.monotonic() + patience
        while self.value("document.body?.dataset.ready") != "yes":
            if time.monotonic() > end:
                raise RuntimeError(f"{path} was not drawn within {patience} s: {self.said()}")
            time.sleep(0.05)

    def said(self):
        """What the page wrote to the console, and errors that nobody caught."""
        lines = []
        for event in self.events:
            about = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled":
                lines.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                lines.append(str(about["exceptionDetails"].get("exception", {}).get("description", about)))
            elif event.get("method") == "Log.entryAdded":
                lines.append(about["entry"]["text"])
        return lines

    def picture(self, path):
        """The whole page, below the window's end too."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


# What a reader would call broken, as lines: content wider than the window (tables and the row of links scroll by themselves), plots
# without a mark in them, labels beyond their plot's edge, tool buttons over a legend or a title.
FAULTS = """(() => {
  const found = [], box = (e) => e.getBoundingClientRect(), name = (e) => e.closest(".plot")?.getAttribute("aria-label") ?? e.tagName;
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const width = document.documentElement.clientWidth;
  for (const e of document.querySelectorAll("body *")) {
    if (!e.closest(".scroll, nav, svg, pre, script") && box(e).width > 0 && box(e).right > width + 1) found.push(`${name(e)} ends at ${box(e).right} of ${width}`);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.querySelector(".heatmaplayer image, .barlayer .point path, .scatterlayer .js-line")) found.push(`${name(plot)} is empty`);
    const texts = [...plot.querySelectorAll("svg text")].filter((t) => t.textContent && box(t).width > 0);
    for (const t of texts) {
      if (box(t).left < box(plot).left - 1 || box(t).right > box(plot).right + 1 || box(t).bottom > box(plot).bottom + 1) found.push(`${name(plot)}: '${t.textContent}' is cut off`);
    }
    for (const button of plot.querySelectorAll(".modebar-btn")) {
      for (const t of texts) if (meet(box(button), box(t))) found.push(`${name(plot)}: buttons over '${t.textContent}'`);
    }
  }
  return [...new Set(found)];
})()"""


def pictures(page, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(profile) as browser:
        for width, name in ((DESKTOP, "desktop"), (PHONE, "phone")):
            for scheme in ("light", "dark"):
                browser.open(page, width, scheme=scheme)
                path = folder / f"{Path(page).stem}-{name}-{scheme}.png"
                browser.picture(path)
                print(path, browser.value("`${document.documentElement.scrollWidth} x ${document.documentElement.scrollHeight}`"), *browser.said(),
                      *browser.value(FAULTS))


if __name__ == "__main__":
    pictures(*sys.argv[1:])
