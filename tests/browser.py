"""Run a page in Chromium without a window, and read what a script of the test writes there."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = shutil.which("chromium")
RESULT = re.compile(r'<pre id="of-the-test">(.*?)</pre>', re.DOTALL)


class Seen(NamedTuple):
    """What a script returned, and what the browser wrote to its console."""

    result: Any
    console: list[str]


def run_in(path: Path, script: str, folder: Path) -> Seen:
    """Open a copy of the page at ``path`` in which ``script``, the body of a function, runs at the end."""
    injected = f"""<script>(() => {{
        const made = document.createElement("pre");
        made.id = "of-the-test";
        made.textContent = JSON.stringify((() => {{ {script} }})());
        document.body.append(made);
    }})();</script></body>"""
    copy = folder / "with_test.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", injected), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    own = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
    command = [str(CHROMIUM), *flags, *own, copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = RESULT.search(done.stdout)
    assert found, f"the script failed: {done.stderr}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console)
