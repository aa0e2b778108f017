"""The page of results and its plan: numbers that are the records', and runs that follow from them."""
import json
import math

import numpy as np
import pytest

import methods
from tools import page, study
from tools.compare import read_records
from tools.intervals import paired


def record(planned, loss, report=None, **more):
    """The record of a planned run: its selection loss, and where it is reported the losses of examples of 10 tokens each."""
    found = {"name": planned.name, "flags": " ".join(planned.flags), "held_out_after": loss,
             "held_out_loss": {"0": 1.4, "16": loss + 0.1 - 0.05 * (planned.name == "sorsa"), "64": loss},
             "lr": float(study.flag({"flags": " ".join(planned.flags)}, "--lr")), "trainable_parameters": 1200, "adapter": {"rank": 4},
             "forgot": 0.01, "prose_loss": {"0": 0.25}}
    if report is not None:
        found |= {"prose_losses": [255.0 * (planned.name == "lora")] * 64, "report_losses": report, "report_tokens": [10] * len(report),
                  "report_loss": sum(report) / (10 * len(report))}
    if "--spectra-every" in planned.flags:
        numbers = {"delta_sigma": 1e-5, "delta_d": 2e-5 if planned.name == "sorsa" else 1e-5, "change": 1e-3, "kappa_start": 1.5,
                   "kappa": 1.3 if planned.name == "sorsa" else 1.4, "u_error": 0.0, "v_error": 0.0}
        found["spectra"] = {"0": {}, "16": {}, "64": numbers}
    return {**found, **more}


def study_of(loss_at, report_of=lambda planned: 10.0, rounds=300):
    """The records of a whole study, run after run: loss_at(job) is the loss that chooses rates, infinite for a run that diverges;
    report_of(job) the loss of every reported example."""
    records, random = [], np.random.default_rng(0)
    examples = random.normal(size=20)
    for _ in range(rounds):
        done = {f"{found['name']}: {found['flags']}" for found in records}
        planned = next((job for job in study.jobs(records) if job.key not in done), None)
        if planned is None:
            return records
        report = list(report_of(planned) + examples) if "--report" in planned.flags else None
        more = {} if not planned.evaluations else {"evaluations": [{"accuracy": 0.5, "n": 4, "right": "1100", "capped": 0.25}] * 2}
        new = record(planned, loss_at(planned), report, **more)
        if not math.isfinite(new["held_out_after"]):
            new = {"name": new["name"], "flags": new["flags"], "error": "lower --lr"}
        records.append(new)
    raise AssertionError("the study has no end")


def valley(best):
    """A loss that rises by 0.1 for every half decade away from a method's best rate; far above, runs diverge."""
    def loss(planned):
        method, rate = (study.flag({"flags": " ".join(planned.flags)}, name) for name in ("--method", "--lr"))
        away = study.HALF_DECADES.index(rate) - study.HALF_DECADES.index(best.get(method, "1e-3"))
        return math.inf if away > 3 else 0.8 + 0.1 * abs(away)
    return loss


def test_the_page_is_what_the_records_say():
    """Every number of RESULTS.md, and what README.md says of them, from results/study.jsonl."""
    assert page.main(["--check"]) is None


def test_default_rates_follow_from_the_records():
    """Of every method, from its runs at its own size: the lowest rate that is as good as the best."""
    assert study.default_rate({"1e-4": 0.756, "3e-4": 0.749, "1e-3": 0.75, "3e-5": 0.76}) == "1e-4"
    records = read_records(study.RECORDS)
    for name, method in methods.METHODS.items():
        losses = study.losses_by_rate(records, name if name == "full" else f"{name}, own size")
        assert float(study.default_rate(losses)) == method.learning_rate, name


def test_the_plan_finds_each_best_rate_wherever_it_is():
    """Below the rates that are tried first, above, and among them: the best has a neighbour on both sides, five rates or more are
    tried, and three other seeds are reported at it. Arms take the rate of their method; no run comes twice."""
    best = {"lora": "3e-3", "pissa": "1e-5", "sorsa": "3e-2", "full": "1e-4"}
    records = study_of(valley(best))
    for method in study.METHODS:
        losses = study.losses_by_rate(records, method)
        place = study.HALF_DECADES.index(best.get(method, "1e-3"))
        assert study.best_rate(losses) == study.HALF_DECADES[place] and len(losses) >= 5
        assert {*study.HALF_DECADES[place - 1:place + 2]} <= losses.keys()
        assert study.reported(records, method).keys() == {*study.SEEDS}
    keys = [f"{found['name']}: {found['flags']}" for found in records]
    assert len(keys) == len(set(keys))
    for name, (_, of) in study.ARMS.items():
        rates = {run["lr"] for run in study.reported(records, name).values()}
        assert rates == {float(study.best_rate(study.losses_by_rate(records, of)))}, name
    assert not any("report_losses" in found for found in records if study.flag(found, "--seed") == "0")
    for name in (*study.OWN_SIZE, *study.OTHER_RANK):
        losses = list(study.losses_by_rate(records, name).values())
        assert len(losses) >= 3 and min(losses) not in (losses[0], losses[-1]), name


def test_a_better_rate_found_late_is_what_counts():
    """Runs at a rate that is no longer the best are not reported: of the method, of its arms, of its accuracy."""
    records = study_of(valley({}))
    flags = study.METHODS["lora"][0]
    records.append(record(study.job("lora", flags, "1e-6"), 0.1))
    assert not study.reported(records, "lora")
    assert study.reported(records, "lora, r 8").keys() == {*study.SEEDS}  # whose rate is its own
    assert not study.evaluations(records, "lora, practice") and study.reported(records, "lora, rate 3e-4")
    records.append(record(study.job("lora", flags, "1e-6", "2"), 0.1, [3.0, 4.0]))
    assert study.reported(records, "lora").keys() == {"2"}


def test_the_method_with_the_most_right_equations_runs_longer():
    """It alone, and not before all have been asked; one that diverged has no answers."""
    records = study_of(valley({}))
    assert sum(found["name"].endswith(study.LONGER) for found in records) == 1
    asked = {found["name"]: found for found in records if found["name"].endswith(", equations")}
    asked["cora, equations"]["evaluations"] = [{"accuracy": 0.75, "n": 4, "right": "1110", "capped": 0.0}] * 2
    assert study.most_right(records, "equations") == "cora" and "| `cora`, three epochs |" in page.accuracy(records)
    del asked["cora, equations"]["evaluations"]
    assert study.most_right(records, "equations") == "full"
    records.remove(asked["lotr, equations"])
    assert study.most_right(records, "equations") is None and "| the best, three epochs |" in page.accuracy(records)


def test_differences_and_verdicts():
    """By hand: lower by 0.5 a token where every example is lower by 5; as a claim expects, against it, or neither."""
    def report_of(planned):
        second = study.flag({"flags": " ".join(planned.flags)}, "--seed") == "2"
        return {"sorsa": 5.0, "pissa": 10.0 + second, "cora": 12.0}.get(planned.name, 10.0)
    records = study_of(valley({}), report_of)
    interval = study.difference(records, "sorsa", "lora")
    assert interval.mean == pytest.approx(-0.5) and interval.low == pytest.approx(-0.5) and interval.seeds == 3
    mixed = study.difference(records, "pissa", "lora")
    assert mixed == pytest.approx(paired([[0.0] * 20, [0.1] * 20, [0.0] * 20])) and not mixed.sure
    said = page.verdicts(records)
    assert "SORSA ends at a lower loss than LoRA: **holds here**; difference to `lora` -0.5000 [-0.5000, -0.5000]." in said
    assert "at twice the rank, is better than LoRA of as many parameters: **contradicted here**; difference to `lora` +0.2000" in said
    assert "SORSA converges faster than `lora`, a lower loss on the way: after 16 steps **holds here**, -0.0500 [-0.0500, -0.0500]." in said
    assert "At these rates more than `lora` forget: none. Less: `full`, `pissa`, `sorsa`," in said
    assert "LoRA forgets less than full fine-tuning: **contradicted here**" in said and "SORSA forgets less than PiSSA: **not seen" in said
    assert "CoRA's basis is a better start for LoRA: **not seen here**" in said and "not run yet" not in said
    assert ("between 0.4817 (`sorsa`) and 1.1817 (`cora`). Worse than `lora`: `cora` (as 8 comparisons at once: `cora`). Better: "
            "`sorsa` (as 8 comparisons at once: `sorsa`).") in said
    assert "lowers the condition number κ of W_p (rise in %): **holds here**; -13.3333 [-13.3343, -13.3323] (the seeds agree" in said
    assert "**holds here**; -13.3333, and -6.6667 for `sorsa, gamma 0`: -6.6667 [-6.6677, -6.6657] (the seeds agree" in said
    assert "(ΔD): **contradicted here**; 2e-05, and 1e-05 for" in said and "(ΔΣ): **not seen here**; 1e-05, and 1e-05 for" in said


def test_what_the_records_round_is_no_difference():
    """A condition number that differs in the last of six digits has neither risen nor fallen."""
    records = study_of(valley({}))
    for found in records:
        if found["name"] == "sorsa" and "spectra" in found:
            found["spectra"]["64"].update(kappa_start=1.35666, kappa=1.35667)
    assert ("condition number κ of W_p (rise in %): **not seen here**; +0.0007 [-0.0003, +0.0017] (the seeds agree: the interval is "
            "the records' rounding).") in page.verdicts(records)


def test_right_answers_beside_lora():
    """By McNemar's test, alone and as one of eight; beside LoRA at a lower rate too; methods that have not been asked are named."""
    records, right = study_of(valley({})), {"lora": 20, "pissa": 26, "sorsa": 40, "cora": 0, f"lora, {study.LOWER}": 30}
    for found in records:
        if found["name"].endswith(", practice") or found["name"] == f"lora, {study.LOWER}":
            first = right.get(found["name"].removesuffix(", practice"), 20)
            found["evaluations"] = [{"accuracy": first / 60, "n": 60, "right": "1" * first + "0" * (60 - first), "capped": 0.0}] * 2
    said = ("- Practice problems, one training seed: more answers right than `lora`: `pissa`, `sorsa` (as 8 comparisons at once: "
            "`sorsa`). Fewer: `cora` (as 8 comparisons at once: `cora`).")
    assert said + (" More than `lora` at a rate of 0.003: `sorsa` (as 8 comparisons at once: `sorsa`). Fewer: `full`, `sara`, `mosara`, "
                   "`cora`, `cora-init`, `lotr` (as 8 comparisons at once: `full`, `sara`,") in page.verdicts(records)
    some = [found for found in records if found["name"] not in ("full, practice", "lotr, practice", f"lora, {study.LOWER}")]
    assert said + " `full`, `lotr`: not run yet.\n" in page.verdicts(some)


def test_a_run_made_on_two_devices_stands_there_twice():
    """Beside the same LoRA; it is none of the plan's, and no verdict counts it."""
    records = study_of(valley({}))
    first, = [found for found in records if found["name"] == "lora, practice"]
    again = {**first, "name": f"lora, {study.AGAIN}", "evaluations": [{"accuracy": 0.75, "n": 4, "right": "1110", "capped": 0.0}] * 2}
    assert "made again" not in page.accuracy(records)
    assert "| `lora` made again on an H100 | 75.0 ± 21.7 | 75.0 ± 21.7 | 1.000 |  |  |  |" in page.accuracy([*records, again])
    assert page.verdicts([*records, again]) == page.verdicts(records)
    assert study.jobs([*records, again]) == study.jobs(records)


def test_what_was_made_on_another_device_is_marked():
    """An arm beside its method, in its row, below the table and in the verdict; forgetting only where the text was another. Runs
    that were made on both are a table of their own."""
    records = [{**found, "device": "cpu", "prose_sha256": "a"} for found in study_of(valley({}))]
    assert "†" not in page.BLOCKS["mosara"](records) and page.twice(records).count("\n") == 1
    arm = [found for found in records if found["name"] == "mosara, router of rank 2"]
    for found in arm:
        found["device"] = "NVIDIA"
    said = page.BLOCKS["mosara"](records)
    assert "| `mosara, router of rank 2` † | r 4 |" in said and said.endswith("\n\n† Made on NVIDIA, `mosara` on cpu.")
    arm[0]["prose_sha256"] = "b"
    assert page.BLOCKS["mosara"](records).endswith('on cpu; "forgot" is of the manual of another Python.')
    assert "with an inner width of 2: **not seen here**; difference to `mosara` +0.0000 [+0.0000, +0.0000], which was made on another" in (
        page.verdicts(records))
    again = {**arm[0], "name": "mosara, router of rank 2, on a CPU", "device": "cpu", "held_out_after": 0.5, "report_loss": 2.0}
    assert page.twice([*records, again]).endswith(
        f"\n| `mosara, router of rank 2` | NVIDIA: 0.8000, {arm[0]['report_loss']:.4f} on the report's | cpu: 0.5000, 2.0000 on the report's |")


def test_looks_on_the_way_are_taken_together():
    """A lead that is sure as one look is not as one of three."""
    records = study_of(valley({}))
    for seed, lead in zip(study.SEEDS, (0.030, 0.045, 0.060)):
        found = study.reported(records, "sorsa")[seed]
        found["held_out_loss"] = {"0": 1.4, "16": 0.9 - lead, "64": 0.8}
    assert "on the way: after 16 steps **holds here**, -0.0450 [-0.0823, -0.0077]." in page.verdicts(records)
    for found in [found for name in ("sorsa", "lora", "pissa") for found in study.reported(records, name).values()]:
        found["held_out_loss"] |= {"32": 0.9, "48": 0.9}
    assert "on the way: after 16 steps **not seen here**, -0.0450 [-0.1112, +0.0212];" in page.verdicts(records)


def test_steps_to_a_loss():
    """By hand, on straight lines between the measurements; reached at once, at a measurement, or never."""
    run = {"held_out_loss": {"0": 1.4, "32": 0.8, "16": 1.0, "64": 0.9}}
    assert [page.steps_to(run, loss) for loss in (1.2, 1.0, 0.85, 0.8, 0.7)] == pytest.approx([8, 16, 28, 32, None])
    ways = {"0": 2.4, "16": 0.8, "32": 0.8}, {"0": 2.4, "16": 1.6, "32": 0.8}, {"0": 2.4, "16": 1.6, "32": 0.9}
    runs = [{**record(study.job("lora", study.METHODS["lora"][0], "1e-3", seed), 0.8, [1.0]), "held_out_loss": way}
            for seed, way in zip(study.SEEDS, ways)]
    (line,) = [line for line in page.convergence(runs).splitlines() if "| `lora`" in line]
    assert line.endswith("| 24.0 ± 11.3 (2 of 3 seeds), 1 never | never |")


def test_few_seeds_decide_nothing():
    """With one or two of three seeds every verdict is open, whatever the numbers; with none at all nothing was run."""
    whole = study_of(valley({}), lambda planned: {"sorsa": 5.0}.get(planned.name, 10.0))
    for left_out in (["3"], ["2", "3"], ["1", "2", "3"]):
        records = [found for found in whole if study.flag(found, "--seed") not in left_out]
        for verdict in page.VERDICTS:
            said = verdict(records)
            assert not any(word in said for word in ("holds", "contradicted", "seen")), said
            assert "not run yet" in said or "**not decided yet**" in said or verdict is page.rate_ratio or "right than" in said
        assert ("-0.5000 [-0.5000, -0.5000], 1 seed." in page.verdicts(records)) == (len(left_out) == 2)
    assert "(2 of 3 seeds)" in page.methods([found for found in whole if study.flag(found, "--seed") != "3"])


def test_what_diverges_is_said():
    """An arm of which every seed diverges; a method of which one does: what is left is counted, and decides nothing."""
    def loss_at(planned):
        seed = study.flag({"flags": " ".join(planned.flags)}, "--seed")
        broken = planned.name == "sorsa, sum" or (planned.name == "lora" and seed == "2")
        return math.inf if broken else valley({})(planned)
    records = study_of(loss_at)
    sorsa, lora = (next(line for line in block(records).splitlines() if f"| `{name}`" in line) for block, name in
                   ((page.arms_of("sorsa"), "sorsa, sum"), (page.methods, "lora")))
    assert "diverged" in sorsa and "(2 of 3 seeds), 1 diverged" in lora and "| diverged |" in page.movement(records)
    assert "SORSA ends at a lower loss than LoRA: **not decided yet**" in page.verdicts(records)
    assert "All methods at their own best rate: `lora` diverged." in page.verdicts(records)


@pytest.mark.parametrize("best", [{}, {"full": "3e-4", "sorsa": "3e-4"}])
def test_the_whole_page_of_a_finished_study(best):
    """Nothing is left to run, and the numbers are there; a method that is best at the rate that four are compared at as well stands
    there with the first of its own runs."""
    records = study_of(valley(best))
    written = page.rewritten((page.ROOT / "RESULTS.md").read_text(), records)
    assert all(text in written for text in ("| `lora` | r 4 | 1,200 | 0.001 |", "**0.8000**", "diverged"))
    assert "not run yet" not in written
    for name in study.WATCHED:
        at_it = study.reported(records, f"{name}, rate 3e-4")
        assert [(seed, found["lr"]) for seed, found in at_it.items()] == [("1", 3e-4)]


def test_runs_whose_products_were_widened_are_counted():
    """Those on CPUs that multiply no bf16; older records do not say it, and of runs that diverged nothing is."""
    records = [{"name": "lora", "products_widened": True}, {"products_widened": False}, {}, {"error": "lower --lr"}]
    assert page.made(records).endswith("; 4 runs, 1 of them with products of bf16 taken in fp32 (of `lora`).")
    assert page.made(records[1:]).endswith("; 3 runs.")


def test_a_study_that_is_not_finished_says_so():
    """Before the first run, and after some."""
    for records in ([], study_of(valley({}))[:30]):
        written = page.rewritten((page.ROOT / "RESULTS.md").read_text(), records)
        assert "not run yet" in written and page.rewritten(written, records) == written


def test_a_wrong_number_is_found(tmp_path, monkeypatch):
    """One digit on the page, or one in the records; a block that nothing makes is named."""
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "RECORDS", tmp_path / "study.jsonl")
    page.RECORDS.write_text("".join(json.dumps(found) + "\n" for found in study_of(valley({}))))
    results, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    results.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in page.BLOCKS))
    readme.write_text("# Title\n<!-- summary -->\n<!-- end -->\n")
    page.main([])
    page.main(["--check"])
    written = results.read_text()
    assert "the nine methods lie between" in readme.read_text() and readme.read_text().startswith("# Title\n<!-- summary -->\n- Each")
    results.write_text(written.replace("0.8000", "0.8001", 1))
    with pytest.raises(ValueError, match=r"RESULTS.md, line \d+, is not what study.jsonl says: run python -m tools.page"):
        page.main(["--check"])
    results.write_text(written)
    page.RECORDS.write_text(page.RECORDS.read_text().replace('"held_out_after": 0.8,', '"held_out_after": 0.75,', 1))
    with pytest.raises(ValueError, match=r"RESULTS.md, line \d+, is not what study.jsonl says"):
        page.main(["--check"])
    no_end = written.replace("<!-- end -->", "", 1)
    for wrong, named in ((written + "<!-- more -->\n", "more"), (no_end, "one is there twice, or has no"), (written * 2, "one is there")):
        results.write_text(wrong)
        with pytest.raises(ValueError, match=f"the page's blocks are not those that tools.page makes: {named}"):
            page.main([])
        assert results.read_text() == wrong
