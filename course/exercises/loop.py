"""The real loop at a small size, for exercises 8 to 10; nothing to fill in."""

import contextlib
import io
import json
import re
from pathlib import Path
from unittest import mock

import metareward
from sampling import Sample, sample

TINY = Path(__file__).parents[2] / "tiny"


def run(out, *flags, judge=None):
    """Run metareward.main and return the records of summary.json. A run that is refused or gives up
    is an AssertionError with its last line.

    judge: instead of letting the model judge, ask judge(question, answer, number) for the text of
    each judgment; number tells the judgments of one answer apart, from 0. The model still answers,
    and still compares judgments where it is asked to.
    """
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        mock.patch("harness.stage.sample", scripted(judge) if judge else sample),
    ):
        try:
            metareward.main(["--out", str(out), *map(str, flags)])
        except SystemExit as end:
            if end.code != 3:  # 3: it ran to its end, but found no pairs in some iteration
                last = said.getvalue().strip().splitlines()[-1]
                raise AssertionError(f"the run ended: {last}") from None
    return json.loads((Path(out) / "summary.json").read_text())


def scripted(judge):
    """What stands in for `sample`: judgments come from the script, all else from the model."""

    def sampler(model, tokenizer, prompts, n, *, on_end, **settings):
        if not prompts[0].endswith('"Score: n".'):
            return sample(model, tokenizer, prompts, n, on_end=on_end, **settings)
        for i, prompt in enumerate(prompts):
            question, answer = re.search(
                r"\nQuestion:\n(.*?)\n\nAnswer:\n(.*)\n\nGive your reasons, then", prompt, re.DOTALL
            ).groups()
            for number in range(n):
                on_end(i, number, Sample(judge(question, answer, number), [0], True))

    return sampler


def first_lines(name, count, folder):
    """A copy in `folder` of the first lines of one of the tiny world's files."""
    file = folder / name
    file.write_text("".join((TINY / name).read_text().splitlines(keepends=True)[:count]))
    return file
