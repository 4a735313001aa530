"""What a GPU machine without internet lacks, as one file: `python benchmarks/wheels.py site.tar.xz`

Downloads the wheels of the packages, in the versions of our requirements, keeps of bitsandbytes the
kernels of one CUDA version, and says how many bytes that makes. There: `mkdir site && tar -xf
site.tar.xz -C site && export PYTHONPATH=$PWD/site`. What the packages need must be there already,
or be named as well.
"""
import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ["transformers", "peft", "bitsandbytes", "trl", "datasets", "dill", "multiprocess"]
GLIBC = ["2_28", "2_27", "2_24", "2_17"]


def pinned(name):
    """A package with the version that our requirements ask for, if they name it."""
    asked = "\n".join((ROOT / file).read_text()
                      for file in ("requirements.txt", "requirements-dev.txt"))
    found = re.search(rf"^{re.escape(name)}==\S+", asked, re.MULTILINE)
    return found[0] if found else name


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", type=Path, help="the archive to write")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="which")
    parser.add_argument("--python", default="3.12", help="the version there")
    parser.add_argument("--cuda", default="130", help="CUDA's version there, as 130 for 13.0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        platforms = [f"--platform=manylinux_{version}_x86_64" for version in GLIBC]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                        "--only-binary=:all:", f"--python-version={args.python}", *platforms,
                        "-d", folder / "wheels", *map(pinned, args.packages)], check=True)
        for wheel in sorted((folder / "wheels").iterdir()):
            zipfile.ZipFile(wheel).extractall(folder / "site")
        for library in (folder / "site").glob("bitsandbytes/libbitsandbytes_*.so"):
            if library.stem not in ("libbitsandbytes_cpu", f"libbitsandbytes_cuda{args.cuda}"):
                library.unlink()
        with tarfile.open(args.file, "w:xz") as archive:
            archive.add(folder / "site", ".")
        print(f"{args.file}: {', '.join(wheel.name for wheel in (folder / 'wheels').iterdir())}: "
              f"{args.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
