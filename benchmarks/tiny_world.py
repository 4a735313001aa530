"""Meta-Rewarding and its ablations in the tiny world, by ground truth: `python benchmarks/tiny_world.py --seeds 0 1 2 3 4`

Runs the main command as a user would, once per seed and variant, and reads figures off the run's files: the actor's true score, padding
sentences (those that match none of the prompt's checks) per answer, characters, and the judge against the truth on M_0's answers.
"""
import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from eval import read_jsonl  # noqa: E402

VARIANTS = {
    "Meta-Rewarding": [],
    "Meta-Rewarding, rho 0": ["--rho", "0"],
    "no meta-judge": ["--no-meta-judge"],
    "no meta-judge, rho 0": ["--no-meta-judge", "--rho", "0"],
    "no position weights": ["--no-position-weights"],
    "advantage fit": ["--position-advantage"],
    "no EFT": ["--no-eft"],
}
FORMS = {"truth": ".2f", "padding": ".2f", "characters": ".0f", "judge": ".1f"}


def padding(folder, checks):
    """Sentences per held-out answer that earn nothing."""
    counts = [sum(not any(re.search(check, sentence) for check in checks[record["prompt_id"]])
                  for sentence in re.split(r"(?<=[.!?])\s+", record["text"]))
              for record in read_jsonl(folder / "eval.jsonl") if record["finished"]]
    return float(np.mean(counts))


def run(out, seed, flags, model):
    start = time.perf_counter()
    with open(f"{out}.log", "w") as log:
        subprocess.run([sys.executable, ROOT / "metareward.py", "--out", out, "--seed", str(seed), "--model", model, *flags],
                       check=True, stdout=log, stderr=log)
    records = json.loads((out / "summary.json").read_text())
    prompts = read_jsonl(Path(json.loads((out / "config.json").read_text())["settings"]["eval_prompts"]))
    checks = {str(i): prompt["checks"] for i, prompt in enumerate(prompts)}
    return {"truth": [r["actor"]["truth"] for r in records], "padding": [padding(out / f"iter{t}", checks) for t in range(len(records))],
            "characters": [r["actor"]["mean_length"] for r in records], "judge": [100 * r["judge"]["truth_agreement"] for r in records],
            "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run each")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which to run")
    parser.add_argument("--model", default=str(ROOT / "tiny"), help="a model folder whose prompts have checks")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_world"), help="where the runs go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        results = []
        for seed in args.seeds:
            r = run(args.out / f"{variant.replace(' ', '-').replace(',', '')}-{seed}", seed, VARIANTS[variant], args.model)
            results.append(r)
            shown = [f"{name} " + " ".join(format(x, form) for x in r[name]) for name, form in FORMS.items()]
            print(f"{variant:22} seed {seed}  " + "   ".join(shown) + f"   {r['seconds']:.0f} s", flush=True)
        means = [f"{name} " + " ".join(format(x, form) for x in np.mean([r[name] for r in results], axis=0)) for name, form in FORMS.items()]
        print(f"{variant:22} mean    " + "   ".join(means), flush=True)


if __name__ == "__main__":
    main()
