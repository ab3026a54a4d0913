"""What do TF32 and bfloat16 cost in energies, gradients and finished images? Emulated, on a CPU.

Subjects are the golden cases that have an energy network, with random weights, and the demo's trained model. The truth
is the frozen pair in float64; the baseline of a chain is the same chain, noise and all, in float32. "fp32, C++" is that
chain on the cpp backend: the effect of summation order alone. In every precision noise, latents, pixels,
energies and the update are float32. bf16 is the frozen pair in bfloat16 on the reference backend: weights and features
are rounded where they are stored, and sums are float32. TF32 is `benchmarks.rounding`.

    python -m benchmarks.precision [--demo FOLDER] [--golden FOLDER ...] [--results FOLDER]

Writes results/precision_cpu.json after every row and precision_cpu.md at the end.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import RESULTS
from benchmarks.gate import REPOSITORY
from benchmarks.report import Columns, markdown
from benchmarks.results_file import ResultsFile
from benchmarks.rounding import TF32Products, require_float32_sums
from vaebm_fast import PRESETS, VAEBM, load_energy, load_nvae
from vaebm_fast.chain.langevin import LangevinSampler, to_uint8
from vaebm_fast.config import Potential
from vaebm_fast.data import digits
from vaebm_fast.evaluation.digit_features import SAMPLES, SAMPLING_SEEDS, Judge, everything, train_digit_classifier
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.ops._backend import Backend, why_absent

Mode = Callable[[], AbstractContextManager[object]]

# The frozen pair's precision and backend, and what its products go through.
PRECISIONS: dict[str, tuple[torch.dtype, Backend, Mode]] = {
    "fp32": (torch.float32, "reference", nullcontext),
    "fp32, C++": (torch.float32, "cpp", nullcontext),
    "tf32": (torch.float32, "reference", TF32Products),
    "tf32, cut off": (torch.float32, "reference", lambda: TF32Products(truncate=True)),
    "bf16": (torch.bfloat16, "reference", nullcontext),
}
GOLDEN = (REPOSITORY / "tests" / "golden", REPOSITORY.parent / "shared" / "golden")
# Golden case -> the preset that it is a small copy of, whose number of steps its chains take, and how many chains.
CASES = {
    "cifar_tiny": ("cifar10", 16),
    "celeba64_tiny": ("celeba_64", 8),
    "alt_tiny": ("lsun_church_64", 8),
    "hq_tiny": ("celeba_256", 2),
}
QUESTION = "What do TF32 and bfloat16 cost in energies, gradients and finished images?"


@dataclass(frozen=True)
class Subject:
    """A model, its chains, and how many are run at once; `distance` judges samples x(eps) of each batch."""

    name: str
    model: VAEBM
    potential: Potential
    steps: int
    step_size: float
    seeds: range
    batch: int
    distance: Callable[[Tensor], float] | None = None

    @property
    def batches(self) -> list[range]:
        return [self.seeds[at : at + self.batch] for at in range(0, len(self.seeds), self.batch)]


@dataclass(frozen=True)
class Finished:
    """What chains end with: mean images and samples, uint8 [N, H, W, C] and one [N, C, H, W] in [0, 1] per batch."""

    means: Tensor
    samples: list[Tensor]


def golden_subject(case: str, folder: Path) -> Subject:
    """The case of `folder`, with the step size of its recorded chain and the number of steps of its preset."""
    preset, chains = CASES[case]
    model = VAEBM(load_nvae(folder / "nvae.pt"), load_energy(folder / "energy.pth"))
    recorded = torch.load(folder / "expected.pt", weights_only=True)["chain_official"]
    steps = PRESETS[preset].sampling.steps
    return Subject(case, model, "official", steps, float(recorded["step_size"]), range(chains), chains)


def demo_subject(folder: Path) -> Subject:
    """The demo's trained model, its chains, and the Frechet distance by which it is judged."""
    model = VAEBM(load_nvae(folder / "vae" / "nvae.safetensors"), load_energy(folder / "energy" / "energy.safetensors"))
    classifier = train_digit_classifier(digits(split="train"))
    judge = Judge(classifier, classifier.features(everything(digits(split="held_out"))[0]))
    sampling, seeds = PRESETS["digits"].sampling, range(SAMPLES * SAMPLING_SEEDS)
    return Subject(
        "demo, trained",
        model,
        sampling.potential,
        sampling.steps,
        sampling.step_sizes[0],
        seeds,
        SAMPLES,
        judge.distance,
    )


def measure(subject: Subject) -> list[dict[str, Any]]:
    """A row per precision; the cpp backend's only where the compiled part is there."""
    require_float32_sums()
    exact = freeze(copy.deepcopy(subject.model).double(), torch.float64, "reference")
    truths: dict[Potential, tuple[Tensor, Tensor]] = {
        potential: potential_and_grad(subject, exact, potential) for potential in ("energy", subject.potential)
    }
    rows: list[dict[str, Any]] = []
    baseline: Finished | None = None
    for precision, (dtype, backend, mode) in PRECISIONS.items():
        if why_absent(backend) is not None:
            continue
        pair = freeze(subject.model, dtype, backend)
        with mode():
            found = {potential: potential_and_grad(subject, pair, potential) for potential in truths}
            finished = run_chains(subject, pair)
        baseline = baseline or finished
        row: dict[str, Any] = {"subject": subject.name, "precision": precision, "potential": subject.potential}
        row |= {"steps": subject.steps, "step_size": subject.step_size, "chains": len(subject.seeds)}
        row["energy_rms_error"] = float((found["energy"][0] - truths["energy"][0]).square().mean().sqrt())
        row["energy_error"] = relative_error(found["energy"][0], truths["energy"][0])
        row["energy_gradient_error"] = relative_error(found["energy"][1], truths["energy"][1])
        row["potential_gradient_error"] = relative_error(found[subject.potential][1], truths[subject.potential][1])
        row |= image_difference(finished.means, baseline.means)
        if subject.distance is not None:
            row["frechet"] = [subject.distance(images) for images in finished.samples]
        rows.append(row)
    return rows


def potential_and_grad(subject: Subject, pair: FrozenVAEBM, potential: Potential) -> tuple[Tensor, Tensor]:
    """U [N] and its gradient [N, D] at the start of the first batch of chains, in float64."""
    sampler = _sampler(subject, pair)
    eps_z, eps_x = sampler.noise_layout.split(sampler.start(subject.batches[0]).to(pair.noise_dtype))
    u, gradients = pair.potential_and_grad(eps_z, eps_x, potential)
    if any(tensor.dtype != pair.noise_dtype for tensor in (u, *gradients)):
        raise TypeError(f"A pair in {pair.dtype} gave energies or gradients that are not {pair.noise_dtype}.")
    return u.double(), sampler.noise_layout.join(gradients[:-1], gradients[-1]).double()


def run_chains(subject: Subject, pair: FrozenVAEBM) -> Finished:
    """All chains of the subject."""
    sampler = _sampler(subject, pair)
    means, samples = [], []
    for seeds in subject.batches:
        chains = sampler.run(seeds)
        means.append(to_uint8(chains.images))
        with torch.no_grad():
            samples.append(pair.image(*sampler.noise_layout.split(chains.eps)))
    return Finished(torch.cat(means), samples)


def _sampler(subject: Subject, pair: FrozenVAEBM) -> LangevinSampler:
    return LangevinSampler(pair, steps=subject.steps, step_size=subject.step_size, potential=subject.potential)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float((found - truth).norm() / truth.norm())


def image_difference(images: Tensor, baseline: Tensor) -> dict[str, float]:
    """Largest and mean difference in grey levels of 0 to 255, and the share of values off by more than one."""
    difference = (images.int() - baseline.int()).abs()
    return {
        "largest_levels": int(difference.max()),
        "mean_levels": float(difference.double().mean()),
        "share_off": float((difference > 1).double().mean()),
    }


def _error(value: float) -> str:
    return f"{value:.1e}"


COLUMNS: Columns = {
    "model": lambda row: str(row["subject"]),
    "precision": lambda row: str(row["precision"]),
    "E": lambda row: _error(row["energy_error"]),
    "E, rms": lambda row: _error(row["energy_rms_error"]),
    "gradient of E": lambda row: _error(row["energy_gradient_error"]),
    "gradient of U": lambda row: _error(row["potential_gradient_error"]),
    "largest difference": lambda row: str(row["largest_levels"]),
    "mean difference": lambda row: f"{row['mean_levels']:.4f}",
    "off by > 1 level": lambda row: f"{100 * row['share_off']:.2f}%",
    "Frechet distance": lambda row: _frechet(row.get("frechet")),
}


def _frechet(distances: Sequence[float] | None) -> str:
    if distances is None:
        return "-"
    return f"{statistics.mean(distances):.2f} ({' '.join(f'{distance:.2f}' for distance in distances)})"


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown, what they are of, and what ran."""
    rows = content["results"]
    chains = {
        row["subject"]: f"{row['chains']} chains of {row['steps']} steps of {row['step_size']:g}, {row['potential']}"
        for row in rows
    }
    facts = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    return (
        f"{content['question']}\n\n{markdown(rows, COLUMNS)}\n\n"
        "E and gradients: |x - x64| / |x64| in norm against float64, at the chains' starts, and E's error as it is "
        "(rms); U is the chain's potential. Differences: mean images of finished chains against those in fp32, in grey "
        "levels of 0 to 255. Frechet distance: of samples x(eps) to held-out digits, mean and each sampling seed. "
        "Chains: "
        f"{'; '.join(f'{name}: {text}' for name, text in chains.items())}.\n\n{facts}.\n"
        + "".join(f"\nNo figure for {entry['what']}: {entry['reason']}\n" for entry in content["refused"])
    )


def found_cases(roots: Sequence[Path]) -> dict[str, Path]:
    """The folders of the golden cases at hand, in the first root that has them."""
    at_hand = ((case, root / case) for case in CASES for root in reversed(roots))
    return {case: folder for case, folder in at_hand if (folder / "energy.pth").is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every subject at hand; write results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `vaebm-fast demo` wrote")
    parser.add_argument("--golden", type=Path, nargs="+", default=GOLDEN, help="folders of golden cases")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not (options.demo / "energy" / "energy.safetensors").is_file():
        parser.error(f"{options.demo} holds no trained demo; `make demo` writes runs/demo, or name one with --demo.")
    file = ResultsFile("precision", QUESTION, {}, options.results)
    found = found_cases(options.golden)
    for case in [case for case in CASES if case not in found]:
        file.refuse(case, f"it is in none of {', '.join(path.name for path in options.golden)}.")
    subjects = [golden_subject(case, folder) for case, folder in found.items()]
    for subject in (*subjects, demo_subject(options.demo)):
        for row in measure(subject):
            file.add(row)
        print(f"{subject.name} done", flush=True)
    text = table(file.content)
    file.path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
