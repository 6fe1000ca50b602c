"""Two processes that share a model steer it as one process does, or refuse with the name of what cannot be exact."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from saeguard.sites import STREAMS
from tests import laws, tensor_parallel
from tests.tensor_parallel import ARCHITECTURES, IDS, SAE, SHARDED, SITES, plans

RANKS = (0, 1)
TIMEOUT_S = 240
CASES = [(name, case) for name in ARCHITECTURES for case in plans() if (name, case) != ("neox", "resid_mid")]
REFUSED = {
    "fully_shard": r"UnsupportedMode: .*fully sharded \(FSDP\).* Load it whole on each rank",
    "fsdp of transformers": r"UnsupportedMode: .*fully sharded \(FSDP\).* with a tp_plan",
    "FullyShardedDataParallel": r"UnsupportedMode: .*fully sharded \(FSDP\).* or a device_map",
    "pipeline": r"UnsupportedMode: .*pipeline parallelism gives each rank some of its blocks\. Load it with tp_plan",
    "experts": r"UnsupportedMode: .*expert parallelism sends tokens to other ranks\. Load it with a tp_plan",
    "sequence": r"UnsupportedMode: .*its tp_plan has sequence_parallel.* a part of the sequence\. Use only",
    "parallelize_module": r"UnsupportedMode: .*DTensors that transformers did not place.* tp_plan='auto'",
    "DistributedDataParallel": r"UnsupportedModel: .*wraps a LlamaForCausalLM\. Steer the wrapped model",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the ranks left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    tensor_parallel.models(folder)
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tensor_parallel", str(rank), str(folder)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in RANKS
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in RANKS]


@pytest.fixture(scope="module")
def alone(folder) -> Any:
    """What one process finds that has the model to itself."""
    model = cache(lambda name: AutoModelForCausalLM.from_pretrained(folder / name).eval())
    return cache(lambda name: (model(name), tensor_parallel.outcomes(model(name))))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_rank_steers_like_one_process(ranks, alone, name, case):
    model, expected = alone(name)
    logits, said, edited = expected[case]

    assert not laws.near_edge(model, plans()[case], [SAE], IDS)
    assert edited
    assert all(any(map(any, calls)) for calls in edited.values())
    for rank in ranks:
        assert rank[name][case][2] == edited
        assert torch.equal(rank[name][case][1], said)
        assert laws.distance(rank[name][case][0], logits) <= laws.TOLERANCE
        assert laws.distance(logits, expected["plain"][0]) > 100 * laws.TOLERANCE
    assert laws.same_bits(ranks[0][name][case][0], ranks[1][name][case][0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_without_a_plan_has_the_bits_of_the_plain_model_on_every_rank(ranks, name):
    for rank in ranks:
        assert laws.same_bits(rank[name]["rows"][0][1], rank[name]["plain"][0][1])
        assert not torch.equal(rank[name]["rows"][0][0], rank[name]["plain"][0][0])


def test_every_rank_carries_the_same_stream(ranks):
    assert ranks[0]["stream"].shape == (*IDS.shape, 32)
    assert laws.same_bits(ranks[0]["stream"], ranks[1]["stream"])


@pytest.mark.parametrize("site", SHARDED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_site_of_which_a_rank_has_a_slice_is_refused_by_name(ranks, name, site):
    for rank in ranks:
        text = rank[name, site]
        assert text.startswith(f"SiteNotFound: site {site} in ")
        assert "sharded by tensor parallelism: each of 2 ranks has a slice of it" in text
        assert "Use a site of the residual stream, or attn_out and mlp_out" in text


def test_every_stream_is_steered_or_refused():
    assert {site.partition(".")[0] for site in (*SITES, *SHARDED)} == set(STREAMS)


@pytest.mark.parametrize("way", REFUSED)
def test_model_spread_in_another_way_is_refused_by_name(ranks, way):
    for rank in ranks:
        assert re.match(REFUSED[way], rank["refused"][way]), rank["refused"][way]


def test_every_way_that_the_ranks_tried_was_looked_at(ranks):
    assert set(ranks[0]["refused"]) == set(ranks[1]["refused"]) == set(REFUSED)


def test_model_inside_distributed_data_parallel_is_steered_through_the_wrapper(ranks, alone):
    for rank in ranks:
        assert laws.same_bits(rank["through DistributedDataParallel"], alone("llama")[1]["norm"][0])


def test_ranks_with_different_plans_are_refused_on_all_of_them(ranks):
    for rank, other in ((0, 1), (1, 0)):
        text = ranks[rank]["other plans"]
        assert text.startswith(f"GuardNotApplied: steering rank {rank} of ")
        assert f"rank {other} enters one with other plans or SAEs" in text
        assert "enter the same blocks, in the same order, on all of them" in text


def test_rank_that_steers_alone_is_refused(ranks):
    assert ranks[0]["one rank"].startswith("GuardNotApplied: steering rank 0 of ")
    assert "rank 1 enters no block" in ranks[0]["one rank"]
