"""Every family, cut in three, equals the whole model; each part reads its own tensors and no others."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import VOCABULARY, save_tiny_model
from shared.errors import JobError, ModelError
from shared.job import Full, Job, Lora, Training
from shared.model.carve import Part, load_head_and_tail, load_part
from shared.model.checkpoint import Checkpoint
from shared.model.families import FAMILIES, family_of
from shared.model.methods.lora import reseed_lora
from shared.model.plan import SplitPlan
from shared.model.trainable import initial_values, make_trainable, trained, update_shapes

LENGTHS = [9, 1, 14, 3]


def parts_of(folder: Path, head: int = 1, tail: int = 1) -> tuple[Part, Part, Part]:
    checkpoint = Checkpoint(str(folder))
    plan = SplitPlan(head, tail, checkpoint.config.num_hidden_layers)
    first, last = load_head_and_tail(checkpoint, plan)
    return first, load_part(checkpoint, plan, "trunk"), last


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def split_logits(parts: tuple[Part, Part, Part], rows: list[Tensor]) -> Tensor:
    head, trunk, tail = parts
    for part in parts:
        part.module.eval()
    lengths = [len(row) for row in rows]
    hidden = trunk.forward(head.embed(torch.cat(rows), lengths), lengths)
    return tail.logits(hidden, lengths, torch.arange(sum(lengths)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_head_trunk_and_tail_are_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path, tied=tied, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    with torch.no_grad():
        logits = split_logits(parts_of(folder), ids())
        expected = torch.cat([whole(folder)(row[None]).logits[0] for row in ids()])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("head", "tail"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt_neo", "gemma3_text"])
def test_any_split_gives_the_same_logits(family: str, head: int, tail: int, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    with torch.no_grad():
        logits = split_logits(parts_of(folder, head, tail), ids())
        torch.testing.assert_close(logits, split_logits(parts_of(folder), ids()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_through_packed_rows_are_the_whole_models(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    parts = parts_of(folder)
    torch.autograd.backward(split_logits(parts, ids()).square().mean())
    model = whole(folder)
    torch.autograd.backward(torch.cat([model(row[None]).logits[0] for row in ids()]).square().mean())
    expected = dict(model.named_parameters())
    seen = set()
    for part in parts:
        for name, parameter in part.named_parameters().items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)
            seen.add(name)
    assert seen == expected.keys()


def test_a_row_sees_no_other_row(tmp_path: Path) -> None:
    parts = parts_of(save_tiny_model("mistral", tmp_path))
    rows = ids()
    with torch.no_grad():
        before = split_logits(parts, rows)
        after = split_logits(parts, [(rows[0] + 1) % VOCABULARY, *rows[1:]])
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


def test_each_part_reads_its_own_tensors_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model("llama", tmp_path)
    read: dict[str, set[str]] = {"head": set(), "trunk": set(), "tail": set()}
    original = Checkpoint.read

    for name in ("head", "trunk", "tail"):

        def keep(self: Checkpoint, names: Iterable[str], name: str = name) -> Iterator[tuple[str, Tensor]]:
            wanted = list(names)
            read[name].update(wanted)
            return original(self, wanted)

        monkeypatch.setattr(Checkpoint, "read", keep)
        part = load_part(Checkpoint(str(folder)), SplitPlan(1, 1, 4), name)
        assert not any(parameter.is_meta for parameter in part.module.parameters())
    assert {n.split(".")[2] for n in read["trunk"]} == {"1", "2"}
    assert "model.embed_tokens.weight" in read["head"]
    assert {"lm_head.weight", "model.norm.weight"} <= read["tail"]
    assert not read["head"] & read["trunk"] | read["trunk"] & read["tail"] | read["head"] & read["tail"]
    assert read["head"] | read["trunk"] | read["tail"] == Checkpoint(str(folder)).files.keys()


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    head, _, tail = parts_of(save_tiny_model("gemma2", tmp_path, tied=True))
    assert tail.module.get_output_embeddings().weight is head.base.embed_tokens.weight


def rename(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_neox", lambda name: name.replace("lm_head", "embed_out")),
        ("gpt2", lambda name: name.removeprefix("transformer.")),
    ],
)
def test_older_names_of_tensors_are_found(family: str, change: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path)
    with torch.no_grad():
        before = split_logits(parts_of(folder), ids())
        rename(folder, change)
        assert torch.equal(split_logits(parts_of(folder), ids()), before)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "opt"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'opt' cannot be split") as refused:
        family_of(Checkpoint(str(folder)).config)
    assert "llama" in (refused.value.hint or "")


def test_a_setting_that_ties_a_block_to_its_place_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        parts_of(folder)


@pytest.mark.parametrize(("head", "tail"), [(2, 2), (3, 1), (9, 9)])
def test_a_split_without_a_trunk_is_refused(head: int, tail: int) -> None:
    with pytest.raises(JobError, match="leave no trunk"):
        SplitPlan(head, tail, 4)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), "has no config"),
        (lambda f: (f / "config.json").write_text("{"), "not a model configuration"),
        (lambda f: (f / "config.json").write_text("null"), "not a model configuration"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not a model configuration"),
        (lambda f: configure(f, model_type=[]), "not a model configuration"),
        (lambda f: configure(f, hidden_size="wide"), "not a model configuration"),
        (lambda f: configure(f, num_attention_heads=0), "not a model configuration"),
        (lambda f: configure(f, id2label=5), "not a model configuration"),
        (lambda f: configure(f, model_type="x", auto_map={"AutoConfig": "x.y"}), "contains custom code"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 9), "corrupt"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not a safetensors index"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "not a safetensors index"),
        (lambda f: rename(f, lambda name: name.replace("layers.2", "layers.7")), "has no tensor"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(damage: Any, said: str, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=said) as error:
        parts_of(folder)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("file", [5, "other", "x" * 9999, "a\0b", "\ud800", ".", "/"])
def test_an_index_that_names_no_file_is_refused(file: Any, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(ModelError, match="the checkpoint has no"):
        Checkpoint(str(folder)).fingerprint()


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"shape \(7,\), the configuration says \(32,\)"):
        parts_of(folder)


def test_fingerprints_tell_what_differs(tmp_path: Path) -> None:
    one = Checkpoint(str(save_tiny_model("llama", tmp_path / "one"))).fingerprint()
    resharded = Checkpoint(str(save_tiny_model("llama", tmp_path / "two", max_shard_size="60KB")))
    assert one.difference(resharded.fingerprint()) is None
    other_seed = Checkpoint(str(save_tiny_model("llama", tmp_path / "three", seed=1))).fingerprint()
    assert "weights" in (one.difference(other_seed) or "")
    wider = Checkpoint(str(save_tiny_model("llama", tmp_path / "four", rms_norm_eps=1e-3))).fingerprint()
    assert "config.json" in (one.difference(wider) or "")


# What is trained


def job_of(folder: Path, **settings: Any) -> Job:
    return Job(model_name_or_path=str(folder), **settings)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's, not ours
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, {}) for family in sorted(FAMILIES)),
        *((family, {"use_rslora": True}) for family in ("llama", "gpt2")),
        *((family, {"use_dora": True}) for family in ("llama", "gpt2", "gpt_neox", "phi3")),
    ],
)
def test_lora_is_pefts_on_the_whole_model_and_reaches_every_block(
    family: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path)
    job = job_of(folder, method=Lora(r=4, lora_alpha=8, **variant))
    parts = parts_of(folder)
    for part in parts:
        make_trainable(part, job)
    mine = trained(parts)
    targets = list(parts[0].family.lora_targets)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2", **variant)
    model = get_peft_model(whole(folder), config)
    reseed_lora(((n.removeprefix("base_model.model."), p) for n, p in model.named_parameters()), job.training.seed)
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():  # B is zero at first, and would hide A
        for index, name in enumerate(sorted(mine)):
            mine[name].normal_(std=0.3, generator=torch.Generator().manual_seed(index))
            theirs[name].copy_(mine[name])
    logits = split_logits(parts, ids())
    expected = torch.cat([model(row[None]).logits[0] for row in ids()])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.autograd.backward(logits.square().mean())
    torch.autograd.backward(expected.square().mean())
    for name, parameter in mine.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [Lora(r=2), Lora(r=2, use_dora=True), Full()], ids=["lora", "dora", "full"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_server_knows_what_an_update_must_hold(family: str, tied: bool, method: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path, tied=tied)
    job = job_of(folder, method=method)
    head, _, tail = parts_of(folder)
    make_trainable(head, job)
    make_trainable(tail, job)
    shapes = {name: tuple(p.shape) for name, p in trained([head, tail]).items()}
    assert update_shapes(Checkpoint(str(folder)).config, head.plan, job) == shapes
    initial = initial_values(Checkpoint(str(folder)), head.plan, job)
    assert initial.keys() == shapes.keys()
    assert all(torch.equal(initial[name], parameter) for name, parameter in trained([head, tail]).items())


def test_parts_that_the_job_does_not_name_are_frozen(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    job = job_of(folder, method=Full(), training=Training(parts=("trunk",)))
    parts = parts_of(folder)
    for part in parts:
        make_trainable(part, job)
    assert {n.split(".")[2] for n in trained(parts)} == {"1", "2"}


def test_a_target_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    head, _, _ = parts_of(folder)
    with pytest.raises(JobError, match="target_modules"):
        make_trainable(head, job_of(folder, method=Lora(target_modules=("nothing",))))


def test_dropout_and_rank_reach_the_layers(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    head, _, _ = parts_of(folder)
    make_trainable(head, job_of(folder, method=Lora(r=3, lora_dropout=0.5, target_modules=("up_proj",))))
    assert {tuple(p.shape) for p in trained([head]).values()} == {(3, 32), (64, 3)}
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in head.module.modules())
