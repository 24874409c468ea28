"""From text to a converted model and a report through Slurm's queue."""

import json

import pytest

from tests.slurm.conftest import Site

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("slurm")]
SMALL = ("--cpus-per-task=2",)


def direct(site: Site, script: str, *arguments: str) -> str:
    """``sbatch slurm/SCRIPT ARGUMENTS``, the other way in."""
    done = site.shell("sbatch", "--parsable", *SMALL, f"slurm/{script}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_report_follows_both_runs_and_is_about_them(site):
    runs = [site.config("a", steps=6), site.config("b", steps=6)]
    report = site.folder / "report"
    job = site.submit("compare.sh", PLT_CONFIG=runs[0], VANILLA_CONFIG=runs[1], REPORT=report)
    assert site.cluster.job(job)["JobState"] == "PENDING"
    site.ended(job, "COMPLETED")
    runs = site.mlflow_runs()
    assert {name: runs[name] for name in "ab"} == dict.fromkeys(
        "ab", ("FINISHED", [1, 2, 3, 4, 5, 6])
    )
    assert "comparison" in runs
    text = "".join(path.read_text() for path in report.glob("*.md"))
    assert "a" in text and "b" in text and list(report.glob("*.png"))


def test_a_run_that_fails_cancels_the_report(site):
    missing = f"data.train=[{{path: {site.folder}/nowhere}}]"
    runs = [site.config("c", steps=6), site.config("d", steps=6)]
    job = site.submit("compare.sh", missing, PLT_CONFIG=runs[0], VANILLA_CONFIG=runs[1],
                      CHECK_DATA="no")  # fmt: skip
    site.ended(job, "CANCELLED")
    first = site.ended(str(int(job) - 2), "FAILED")
    assert (first["ExitCode"], first["Restarts"]) == ("2:0", "0")
    log = site.log(str(int(job) - 2))
    assert f"error: {site.folder}/nowhere" in log and "has to be changed: not requeued" in log


def test_two_runs_in_one_folder_are_refused(site):
    done = site.shell("bash", "slurm/compare.sh", f"train.output_dir={site.folder}/same")
    assert done.returncode == 2 and "both runs would write to" in done.stderr


def test_a_login_node_without_the_environment_submits_unchecked(site):
    """Its Python may be older than ours, or in a container: the jobs check themselves."""
    bare = site.folder / "bare_python"
    bare.write_text("#!/bin/sh\necho No module named pltmoe >&2; exit 1\n")
    bare.chmod(0o755)
    same = f"train.output_dir={site.folder}/same"
    job = site.submit("compare.sh", same, PYTHON=bare)
    site.cluster.run("scancel", *(str(int(job) - n) for n in range(3)))
    done = site.shell("bash", "slurm/pretrain_plt_moe.sh", PYTHON="nosuchpython")
    site.cluster.run("scancel", done.stdout.strip())
    assert "nosuchpython cannot import pltmoe.plan here: the job checks itself" in done.stderr


def test_preprocess_then_convert(site):
    folder = site.files.parent
    corpus, output = site.folder / "corpus", site.folder / "hf"
    job = direct(site, "preprocess.sh", str(folder / "text"), "--tokenizer",
                 str(folder / "tokenizer.model"), "--output", str(corpus))  # fmt: skip
    site.ended(job, "COMPLETED")
    assert corpus.with_suffix(".idx").read_bytes() == (folder / "corpus.idx").read_bytes()
    job = direct(site, "convert_to_hf.sh", "--checkpoint", str(site.folder / "a"),
                 "--output", str(output))  # fmt: skip
    site.ended(job, "COMPLETED")
    assert json.loads((output / "config.json").read_text())["model_type"] == "plt_moe"
