"""测速：交错、比值、记录都说得准；存着的记录撑得起课程与 README 里的话。这里不量快慢。"""

import json
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from conftest import ROOT
from vaelab.bench import likelihood, speedrun
from vaelab.bench.contest import Contest, ratio
from vaelab.bench.recipes import CHANGES, Cost, Recipe, steps_of, times_faster
from vaelab.bench.speedrun import final, timed, without_test
from vaelab.data import load
from vaelab.records import read_records, write_record


def ticking(seconds: float, value: float):
    while True:
        time.sleep(seconds)
        yield value


def dying():
    yield 1
    raise SystemExit(3)


def test_contestants_take_turns_in_their_own_processes():
    with Contest({"slow": (ticking, 0.02, 1.0), "fast": (ticking, 0.0, 2.0)}) as contest:
        seconds = contest.race(rounds=3, steps=4, warmup=1)
        assert {name: len(times) for name, times in seconds.items()} == {"slow": 3, "fast": 3}
        assert all(slow >= 4 * 0.02 for slow in seconds["slow"])
        assert [contest.go(name)[1] for name in ("slow", "fast")] == [1.0, 2.0]
        processes = contest.processes
    assert not any(process.is_alive() for process in processes)


def test_a_contestant_that_dies_is_an_error_not_a_wait():
    with Contest({"dying": (dying,)}) as contest:
        assert contest.go("dying")[1] == 1
        with pytest.raises(EOFError):
            contest.go("dying")


def test_ratio_is_of_each_round():
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 4.0]) == {"median": 2.0, "low": 2.0, "high": 3.0}


def test_what_auto_is_worth_counts_its_preparation():
    costs = {"usual": Cost(1.0, [0.1]), "off": Cost(2.0, [0.05]), "on": Cost(31.0, [0.02])}
    assert times_faster(costs, "off", 1) == 0.5 and times_faster(costs, "off", 21) == 1.0
    assert times_faster(costs, "on", 101) == pytest.approx(11 / 33) and times_faster(costs, "on", 100_001) == pytest.approx(10_001 / 2_031)
    start = costs["on"].steps_to_be(3, costs["usual"])  # 1 + 0.1·n = 3·(31 + 0.02·n)
    assert times_faster(costs, "on", start - 1) < 3 <= times_faster(costs, "on", start)
    assert costs["off"].steps_to_be(2.5, costs["usual"]) is None and costs["on"].steps_to_be(0.01, costs["usual"]) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_to_the_usual_loop_changes_its_speed_not_its_numbers(change):
    """阶梯里只管快慢的各级：从同样的种子出发，走出同样的路（舍入除外）。"""
    data = load("faces", image_size=16, count=60)
    plain = Recipe("", usual=True, keep_memory=False, batch_size=16, lr=1e-3, seed=2)
    small = {"latent_dim": 3, "hidden_dims": [4, 8]}
    ends = [list(islice(steps_of(recipe, data, small, 8), 9))[-1] for recipe in (plain, replace(plain, changes=(change,)))]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


def test_the_curve_is_measured_on_the_way_and_at_the_end():
    data = load("faces", image_size=16, count=60)
    recipe = Recipe("", usual=True, keep_memory=False, batch_size=16, lr=1e-3)
    small = {"latent_dim": 3, "hidden_dims": [4, 8]}
    found = list(islice(steps_of(recipe, data, small, 8, every=3), 9))
    assert [each is not None for each in found] == [False, False, True, False, False, True, False, False, True]
    assert found[-1] == list(islice(steps_of(recipe, data, small, 8), 9))[-1]  # 半路的评价不改变训练


def test_a_rung_counts_its_set_up_and_every_seed_has_to_arrive():
    usual, cost = Cost(1.0, [0.1, 0.2]), Cost(2.0, [0.05, 0.05])
    row = {"recipe": {"batch_size": 32}, "images": [3200, 6400]}
    found = timed(row, cost, usual, 6400)
    whole = [(1 + 99 * each) / (2 + (n - 1) * 0.05) for n in (100, 200) for each in usual.steps]
    assert (found["low"], found["high"]) == (round(min(whole), 2), round(max(whole), 2)) and found["low"] <= found["speedup"] <= found["high"]
    assert found["throughput"] == {"median": 1.5, "low": 1.0, "high": 2.0} and found["setup"] == round(2 / 0.15, 1)
    assert timed({**row, "images": [3200, None]}, cost, usual, 6400)["speedup"] is None
    assert final([[(1, 0.0), (2, 1.0)], [(2, 3.0)]]) == (2.0, pytest.approx(2**0.5))


def test_the_shortest_length_is_the_first_that_reaches(monkeypatch):
    """长度由验证集定：假的训练，看到 7,000 张才够。"""
    asked = []

    def found(jobs, validate):
        asked.extend(images for _, images in jobs)
        assert validate
        return [[(images, images + recipe.lr)] for recipe, images in jobs]

    monkeypatch.setattr(speedrun, "curves", found)
    slow, quick = (Recipe("", lr=lr) for lr in (1.0, 2.0))
    recipe, images = speedrun.shortest([slow, quick], target=7_000.0)
    lengths = [round(part * speedrun.IMAGES) for part in speedrun.LENGTHS]
    assert recipe == quick and images == next(length for length in lengths if length + 2 >= 7_000) and len(asked) < 3 * len(lengths)
    assert speedrun.shortest([quick], target=1e9)[1] == speedrun.IMAGES


@pytest.mark.parametrize("usual", [True, False])
def test_both_ways_of_training_walk_the_same_number_of_steps(usual):
    data = load("faces", image_size=16, count=60)
    recipe = Recipe("", usual=usual, keep_memory=False, precision="fp32", batch_size=16, lr=1e-2)
    walk = steps_of(recipe, data, {"latent_dim": 3, "hidden_dims": [4, 8]}, total=40)
    assert [next(walk) for _ in range(40)] == [None] * 40
    trained = next(walk)
    untrained = steps_of(recipe, data, {"latent_dim": 3, "hidden_dims": [4, 8]}, total=0)
    assert trained > next(untrained) + 50 and next(walk) == trained


def test_validation_never_sees_the_test_set():
    data = load("faces", image_size=8, count=100)
    held_out = without_test(data)
    assert torch.equal(torch.cat([held_out.train, held_out.test]), data.train)


@pytest.mark.parametrize("name", sorted(likelihood.OUTPUTS))
def test_a_likelihood_sums_to_one_over_the_levels(name):
    """离散的加起来是 1；密度乘格宽，在格内积分也是；灰阶上的交叉熵不是。"""
    out = torch.tensor([[0.4, -2.0, -1.0], [0.95, -4.0, 0.5], [0.5, -1.5, 0.1]], dtype=torch.float64)[:, : likelihood.OUTPUTS[name]]
    levels = (
        torch.arange(-20000.0, 20000.0, dtype=torch.float64) if "mass" not in name and name.startswith(("g", "l")) else torch.arange(256.0).double()
    )
    k, u = levels[:, None].expand(-1, 3), torch.full((len(levels), 3), 0.5, dtype=torch.float64)
    total = likelihood.log_mass(name, k, out.expand(len(levels), *out.shape), torch.tensor(-2.0), u).exp().sum(0)
    assert ((total - 1).abs() < 1e-4).all() == (name != "bernoulli") and (total < 128.1).all()


def test_the_likelihood_bench_trains_and_packs():
    images = load("faces", image_size=8, channels=1, count=200).train[:, 0]
    lossless = likelihood.compressors(images[:100], images[100:])
    assert 0 < lossless["lzma"] < 20 and 0 < lossless["left_neighbour"] < 20
    models = [likelihood.train("logistic_mass", images.flatten(1), 0, steps=steps, hidden=8, latent=2) for steps in (1, 80)]
    before, after = (likelihood.bits_per_pixel(model, "logistic_mass", images.flatten(1)) for model in models)
    assert 0 < after < before


def test_a_record_keeps_what_was_not_measured_again(tmp_path):
    path = write_record({"loop": {"ratio": {"median": 3.0}}, "data": {"ratio": {"median": 40.0}}}, tmp_path)
    assert write_record({"loop": {"ratio": {"median": 3.5}}}, tmp_path) == path
    (record,) = read_records(tmp_path)
    assert record["loop"]["ratio"]["median"] == 3.5 and record["data"]["ratio"]["median"] == 40.0
    assert record["machine"]["cores"] >= 1 and record["loop"]["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("record", read_records(), ids=lambda record: record["machine"]["gpu"] or record["machine"]["cpu"])
def test_committed_records_say_where_when_and_with_what(record):
    assert {"machine", "date", "versions"} <= record.keys()
    for section in ("loop", "data", "endtoend", "allocator", "epoch", "scale", "speedrun", "likelihood"):
        if section in record:
            assert {"date", "versions"} <= record[section].keys()
    assert not any(word in json.dumps(record) for word in ("/tmp", "/home", "/root", "/work"))


def newest(section: str) -> dict:
    """最新的、量过这一项的记录里的这一项；各台机器量过的不一样。"""
    return [record[section] for record in read_records() if section in record][-1]


def test_the_readme_quotes_the_newest_record_of_each_kind():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ratios = [newest(section)["ratio"] for section in ("loop", "data", "endtoend")] + [newest("loop")["compiled_ratio"]]
    for numbers in ratios:
        assert f"{numbers['median']:g} 倍（{numbers['low']:g}–{numbers['high']:g}）" in readme
    run = newest("speedrun")
    last = run["ladder"][-1]["throughput"]
    assert f"{last['median']:g} 倍（{last['low']:g}–{last['high']:g}）" in readme
    assert f"{run['target_elbo']:g} ± {run['target_sd']:g}" in readme


@pytest.mark.parametrize("record", [record for record in read_records() if "speedrun" in record], ids=lambda record: record["machine"]["cpu"])
def test_the_recorded_ladder_keeps_the_rules(record):
    """一级只改一样；每级的种子、区间、是否到达，与记下的做法相符。"""
    run = record["speedrun"]
    usual = run["ladder"][0]
    assert usual["speedup"] == 1 and usual["elbo"] == run["target_elbo"] and usual["recipe"]["usual"]
    assert len(run["search"]) == len(speedrun.SEARCH) and run["seeds"] == len(speedrun.SEEDS) >= 3
    best = max(run["search"], key=lambda each: each["validation_elbo"])
    assert all(usual["recipe"][name] == best[name] for name in ("lr", "kld_weight", "schedule"))
    together = {"name", "lr"}  # 学习率随批与权重一起在验证集上定
    for before, rung in zip(run["ladder"], run["ladder"][1:]):
        changed = {name for name, value in rung["recipe"].items() if value != before["recipe"][name]} - together
        assert len(changed) == 1 or changed <= {"usual", "changes", "precision", "cuda_graphs"}, (rung["name"], changed)
        assert len(rung["images"]) == run["seeds"] and rung["predicted"] > 0 and rung["why"]
        assert (rung["speedup"] is None) == (None in rung["images"])
        assert rung["speedup"] is None or rung["low"] <= rung["speedup"] <= rung["high"]
