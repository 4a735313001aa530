"""A run's folder: whose it is, and what it holds so far.

A folder belongs to one run: its config.json says which settings it has, and the hashes of what it
reads. Nobody else may go on with it, and no two processes at once.
"""
import dataclasses
import fcntl
import json
import sys
from pathlib import Path

import torch
import transformers

from harness.engine.processes import barrier, rank
from harness.files import iterations, read_json, read_jsonl, write_jsonl, write_whole
from harness.settings import flag

FORMAT = 6  # of a run's folder; runs of another are not resumed
FREE = ("iters", "out", "max_tokens_in_cache")  # may change when a run goes on


class Folder:
    """runs/x: config.json, a lock, summary.json, and a folder for each iteration."""

    def __init__(self, settings, files, prompts):
        """files: {flag: a hash of what it reads}. prompts: the records of --prompts, or None.

        Raises ValueError if the folder is another run's, or in use.
        """
        self.settings, self.out, self.prompts = settings, Path(settings.out), prompts
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "transformers": transformers.__version__}
        config = {"format": FORMAT, "settings": dataclasses.asdict(settings), "files": files,
                  "versions": versions}
        self.config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if (self.out / "config.json").is_file() and rank() == 0:
            self.lock_folder()
        self.check_folder()

    def check_folder(self):
        """Refuse a folder whose run had other settings, or read files of another content.

        More iterations may be asked for later. Returns notes on versions that have changed.
        """
        in_the_way = next((place for place in (self.out, *self.out.parents) if place.is_file()),
                          None)
        if in_the_way:
            raise ValueError(f"--out {self.out}: {in_the_way} is a file, and no folder can be made "
                             "there: choose another --out")
        file = self.out / "config.json"
        if not file.exists():
            if (self.out / "summary.json").exists() or any(self.out.glob("iter*")):
                raise ValueError(f"{file} is missing, which says what run this is: put it back "
                                 "from a copy, or choose another --out")
            return []
        theirs, mine = read_json(file), self.config
        if not isinstance(theirs, dict) or not isinstance(theirs.get("settings"), dict):
            raise ValueError(f"{self.out} is no run's folder, though it has a config.json: "
                             "choose another --out")
        if theirs.get("format") != FORMAT:
            raise ValueError(f"{self.out} holds a run of another version of this program, which "
                             "left other files: choose another --out")
        self.check_settings(theirs["settings"], mine["settings"])
        for name, content in theirs.get("files", {}).items():
            may_grow = name == "--prompts"
            if content != mine["files"].get(name) and not (may_grow and self.begins_with_used()):
                longer = ", or a file that begins with the same prompts" if may_grow else ""
                raise ValueError(f"{self.out} holds a run whose {name} had another content: "
                                 f"choose another --out{longer}")
        return [f"this run was begun with {name} {version}, and goes on with "
                f"{mine['versions'].get(name)}"
                for name, version in theirs.get("versions", {}).items()
                if version != mine["versions"].get(name)]

    def begins_with_used(self):
        """Whether --prompts begins with what the run has used of it, so that it may go on longer.
        """
        used = [record for _, folder in sorted(iterations(self.out).items())
                for record in read_jsonl(folder / "prompts.jsonl")]
        return bool(used) and used == (self.prompts or [])[:len(used)]

    def check_settings(self, theirs, mine):
        done = len(self.records()) - 1
        if self.settings.iters < done:
            raise ValueError(f"{self.out} holds a run of {done} iterations: "
                             "--iters may grow, not shrink")
        other = []
        for name, value in mine.items():
            was = theirs.get(name)
            # --iters 2 --rho 0 .3 may become --iters 3 --rho 0 .3 .3
            goes_on = (isinstance(was, list) and len(was) == theirs.get("iters")
                       and value[:len(was)] == was)
            if name not in FREE and value != was and not goes_on:
                other.append(f"{flag(name)} {was}, not {value}")
        if other:
            raise ValueError(f"{self.out} holds a run with {'; '.join(other)}: choose another "
                             "--out, or the same settings")

    def lock_folder(self):
        """Refuse a folder that another process works on. The lock ends with this process."""
        self.lock = open(self.out / "lock", "a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.out} is in use by another process: wait for it, or choose "
                             "another --out") from None

    def claim_folder(self):
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock_folder()
            for note in self.check_folder():  # another process may have come meanwhile
                print(f"note: {note}", file=sys.stderr)
            done = len(self.records()) - 1
            if 0 <= done < self.settings.iters:
                print(f"{self.out} is there, up to M_{done}: the run goes on", flush=True)
            write_whole(self.out / "config.json", json.dumps(self.config, indent=1) + "\n")
        barrier()

    def folder(self, t):
        folder = self.out / f"iter{t}"
        folder.mkdir(exist_ok=True)
        return folder

    def save(self, t, name, records):
        """Write iterT/name whole, which one process does for all."""
        if rank() == 0:
            write_jsonl(self.folder(t) / name, records)
        barrier()

    def seconds(self, t):
        """{stage: seconds} of iteration t so far. No run shall end for want of it."""
        return read_json(self.folder(t) / "seconds.json", dict, notes=[])

    def records(self):
        """The records of summary.json: one for each model that is trained and measured."""
        return read_json(self.out / "summary.json", list)

    def made(self, t):
        """The figures of how M_t was made, or None if it is not trained yet."""
        return read_json(self.folder(t) / "figures.json", dict) or None
