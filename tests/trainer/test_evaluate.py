"""evaluate.py against plain loops: one picture, one caption, one comparison at a time."""

from __future__ import annotations

import copy
import json
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import tiny
import torch
import typer
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SimpleTokenizer,
    build_zero_shot_classifier,
)
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from modelchain.api.contracts import DataRequest, EvaluationTask, TaskEvaluation, TrainFiles
from modelchain.errors import InputError, WorkError
from modelchain_data.batches import evaluation_image
from modelchain_data.index import open_set
from modelchain_data.request import open_evaluations
from modelchain_trainer import commands, models
from modelchain_trainer.evaluate import Evaluator, measure

torch.set_num_threads(1)
CONTEXT = 12
TOKENIZER = SimpleTokenizer(context_length=CONTEXT)
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def clip():
    """A model with random weights, whose features differ between pictures and captions. The seed
    does not matter.
    """
    return models.build(tiny.spec(tiny.model(16, 16, 1)).spec.stages[0].config.resolved(), 5)


def evaluation(kind="ZeroShot", name="it", **fields):
    lists = {"class_names": "names", "templates": "templates"} if kind == "ZeroShot" else {}
    return TaskEvaluation(
        name=name, kind=kind, shards="/data/x.tar", files=[], **{**lists, **fields}
    )


def zero_shot(folder, names, samples, templates=("a handwritten {}.", "{}")):
    """An evaluation and its set; `samples` are pairs of a digit's index and its label."""
    made = []
    for index, label in samples:
        picture, meta = tiny.digit(index)
        made.append((picture, {**meta, "label": label, "classname": None}))
    tiny.shard(folder / "set.tar", made)
    (folder / "names.json").write_text(json.dumps(names))
    (folder / "templates.json").write_text(json.dumps(templates))
    lists = {"class_names": str(folder / "names.json"), "templates": str(folder / "templates.json")}
    return evaluation(**lists), open_set([folder / "set.tar"], folder / "cache")


def retrieval(folder, captions):
    """An evaluation and its set, of digits i with the captions `captions[i]`."""
    tiny.shard(folder / "set.tar", [tiny.digit(i, texts) for i, texts in enumerate(captions)])
    return evaluation("Retrieval"), open_set([folder / "set.tar"], folder / "cache")


def evaluator(*evaluations, precision=nullcontext, batch=5):
    return Evaluator(evaluations, CONTEXT, torch.device("cpu"), 2, precision, batch)


@torch.no_grad()
def unit_image(clip, samples, i):
    feature = clip.encode_image(models.normalise(evaluation_image(samples.picture(i), 16)[None]))[0]
    return feature / feature.norm()


@torch.no_grad()
def unit_text(clip, text):
    feature = clip.encode_text(TOKENIZER([text]))[0]
    return feature / feature.norm()


def rank(scores, wanted):
    """The place, counted from 0, of the best of the wanted ones among all scores."""
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    return min(order.index(k) for k in wanted)


def naive_zero_shot(clip, samples, names, templates):
    classes = []
    for name in names:
        mean = sum(unit_text(clip, template.replace("{}", name)) for template in templates) / len(
            templates
        )
        classes.append(mean / mean.norm())
    places = []
    for i in range(len(samples)):
        image = unit_image(clip, samples, i)
        places.append(rank([float(image @ c) for c in classes], [int(samples.labels[i])]))
    return {k: 100 * sum(place < k for place in places) / len(places) for k in (1, 5)}


def naive_retrieval(clip, samples, captions):
    images = [unit_image(clip, samples, i) for i in range(len(captions))]
    texts = [(owner, unit_text(clip, text)) for owner, some in enumerate(captions) for text in some]
    to_text = [
        rank(
            [float(image @ text) for _, text in texts],
            [k for k, (owner, _) in enumerate(texts) if owner == i],
        )
        for i, image in enumerate(images)
    ]
    to_image = [rank([float(image @ text) for image in images], [owner]) for owner, text in texts]
    share = lambda places, k: 100 * sum(place < k for place in places) / len(places)  # noqa: E731
    wanted = {f"it/image-to-text-r{k}": share(to_text, k) for k in (1, 5, 10)}
    wanted |= {f"it/text-to-image-r{k}": share(to_image, k) for k in (1, 5, 10)}
    return wanted | {"it": (wanted["it/image-to-text-r1"] + wanted["it/text-to-image-r1"]) / 2}


COLOURS = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]


def some_captions(pictures):
    """One to three captions for each picture, all different and of different lengths."""
    return [
        [f"{COLOURS[i % 8]} {tiny.NAMES[i // 8]}" + " and more" * j for j in range(1 + i % 3)]
        for i in range(pictures)
    ]


def test_zero_shot_is_the_plain_loop(clip, tmp_path):
    samples = [(i, (i * 7) % 10) for i in range(40)]
    pair = zero_shot(tmp_path, tiny.NAMES, samples)
    wanted = naive_zero_shot(clip, pair[1], tiny.NAMES, ("a handwritten {}.", "{}"))
    assert evaluator(pair)(clip) == pytest.approx({"it": wanted[1], "it/top-5": wanted[5]})
    assert 0 < wanted[1] < wanted[5] < 100


def test_class_vectors_are_open_clips(clip):
    names, templates = list(IMAGENET_CLASSNAMES[::50]), list(OPENAI_IMAGENET_TEMPLATES)
    with torch.no_grad():
        ours = evaluator(batch=64).class_vectors(clip.eval(), names, templates)
    assert torch.allclose(
        ours.T, build_zero_shot_classifier(clip, TOKENIZER, names, templates), atol=1e-6
    )


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_zero_shot_of_few_classes_has_no_top_5(clip, tmp_path, classes):
    pair = zero_shot(tmp_path, tiny.NAMES[:classes], [(i, i % classes) for i in range(7)])
    wanted = naive_zero_shot(clip, pair[1], tiny.NAMES[:classes], ("a handwritten {}.", "{}"))
    assert evaluator(pair)(clip) == pytest.approx({"it": wanted[1]})


def test_zero_shot_of_more_classes_than_one_batch(clip, tmp_path):
    names = [f"{colour} {name}" for name in tiny.NAMES for colour in COLOURS]
    pair = zero_shot(tmp_path, names, [(i, (i * 13) % 80) for i in range(30)], ("a {}",))
    wanted = naive_zero_shot(clip, pair[1], names, ("a {}",))
    assert evaluator(pair)(clip) == pytest.approx({"it": wanted[1], "it/top-5": wanted[5]})


@pytest.mark.parametrize("batch", [4, 128])
def test_retrieval_is_the_plain_loop_with_several_captions_a_picture(clip, tmp_path, batch):
    captions = some_captions(23)
    pair = retrieval(tmp_path, captions)
    wanted = naive_retrieval(clip, pair[1], captions)
    assert evaluator(pair, batch=batch)(clip) == pytest.approx(wanted)
    assert 0 < wanted["it/text-to-image-r10"] < 100


@pytest.mark.parametrize(
    ("pictures", "ks"), [(1, {1}), (4, {1}), (5, {1, 5}), (9, {1, 5}), (10, {1, 5, 10})]
)
def test_retrieval_of_few_pictures_has_no_recall_among_more_than_there_are(
    clip, tmp_path, pictures, ks
):
    captions = some_captions(pictures)
    pair = retrieval(tmp_path, captions)
    metrics = evaluator(pair)(clip)
    names = {f"it/{way}-r{k}" for way in ("image-to-text", "text-to-image") for k in ks}
    assert set(metrics) == {"it", *names}
    assert metrics == pytest.approx(
        {n: v for n, v in naive_retrieval(clip, pair[1], captions).items() if n in metrics}
    )


def test_of_equal_captions_only_one_finds_its_picture(clip, tmp_path):
    pair = retrieval(tmp_path, [["the same"], ["the same"], ["the same"], ["the same"]])
    metrics = evaluator(pair)(clip)
    assert metrics["it/text-to-image-r1"] == 25
    assert metrics["it/image-to-text-r1"] == 25, "four equal captions: chance, not luck"


def test_a_caption_longer_than_the_context_is_cut_as_open_clip_cuts_it(clip, tmp_path):
    captions = [[" ".join([colour, *tiny.NAMES, *tiny.NAMES])] for colour in COLOURS]
    pair = retrieval(tmp_path, captions)
    assert evaluator(pair)(clip) == pytest.approx(
        {
            name: value
            for name, value in naive_retrieval(clip, pair[1], captions).items()
            if "r10" not in name
        }
    )


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_measure_what_one_measures(clip, tmp_path, world):
    """In threads, with a replacement for the sum over ranks; test_train.py has real ranks."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = zero_shot(tmp_path / "a", tiny.NAMES, [(i, i % 10) for i in range(7)])
    second = retrieval(tmp_path / "b", some_captions(5))
    pairs = first, (second[0].model_copy(update={"name": "other"}), second[1])
    alone = evaluator(*pairs)(clip)
    barrier, shares, found = threading.Barrier(world), {}, {}

    def run(rank):
        one = evaluator(*pairs)
        one.rank, one.world = rank, world

        def sum_of_all(tensor):
            shares[rank] = tensor
            barrier.wait(30)
            total = sum(shares[r] for r in range(world))
            barrier.wait(30)
            return total

        one._sum = sum_of_all
        found[rank] = one(clip)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == world and all(
        metrics == pytest.approx(alone) for metrics in found.values()
    )


def test_similarities_are_fp32_where_the_towers_are_bf16(clip, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pairs = (
        zero_shot(tmp_path / "a", tiny.NAMES, [(0, 0)]),
        retrieval(tmp_path / "b", some_captions(5)),
    )
    seen, topk = set(), torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *a, **k: (seen.add(self.dtype), topk(self, *a, **k))[1]
    )
    ran = []
    hook = clip.visual.conv1.register_forward_hook(
        lambda *_: ran.append(torch.is_autocast_enabled("cpu"))
    )
    evaluator(*pairs, precision=BF16)(clip)
    hook.remove()
    assert seen == {torch.float32} and ran and all(ran)


def test_compiled_layers_run_as_they_are(clip, tmp_path):
    """An evaluation's last batch and its captions have shapes that no training step has, and that
    are not worth a compilation.
    """
    compiled = copy.deepcopy(clip)
    models.compile_layers(compiled)
    pair = retrieval(tmp_path, some_captions(7))
    torch._dynamo.reset()
    counters.clear()
    assert evaluator(pair)(compiled) == evaluator(pair)(clip) and not counters["frames"]


def test_the_model_is_left_as_it_was_and_only_due_evaluations_run(clip, tmp_path):
    one, samples = zero_shot(tmp_path, tiny.NAMES, [(0, 0)])
    modes = []
    hook = clip.visual.conv1.register_forward_hook(lambda module, *_: modes.append(module.training))
    for training in (True, False):
        clip.train(training)
        both = evaluator((one.model_copy(update={"every_epochs": 2}), samples))
        assert [bool(both(clip, epoch)) for epoch in (None, 1, 2, 3, 4)] == [
            True,
            False,
            True,
            False,
            True,
        ]
        assert clip.training is training
    hook.remove()
    assert modes == [False] * 6 and not evaluator((one, samples))(clip, 2) and not evaluator()(clip)
    assert all(p.grad is None for p in clip.parameters())


def test_an_undecodable_evaluation_picture_is_an_error_that_names_it(clip, tmp_path):
    picture, meta = tiny.digit(0)
    tiny.shard(tmp_path / "set.tar", [(picture, meta), (picture[:60], meta)])
    pair = evaluation("Retrieval"), open_set([tmp_path / "set.tar"], tmp_path / "cache")
    with pytest.raises(WorkError, match="'0001' cannot be decoded") as error:
        evaluator(pair)(clip)
    assert error.value.failure == "Data"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("names.json", None, "cannot be read"),
        ("names.json", '["one"', "is not JSON"),
        ("names.json", "[]", "must be a JSON list of texts"),
        ("names.json", '["one", 2]', "must be a JSON list of texts"),
        ("names.json", '{"one": 1}', "must be a JSON list of texts"),
        ("names.json", '["zero"]', "label 3; there are 1 class names"),
        ("templates.json", '["a photo"]', "has no {} for the class"),
        ("templates.json", '["  "]', "must be a JSON list of texts"),
        ("templates.json", None, "cannot be read"),
    ],
)
def test_bad_class_names_and_templates_are_input_errors(tmp_path, file, content, says):
    pair, _ = zero_shot(tmp_path, tiny.NAMES, [(0, 3)])
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as error:
        open_evaluations(request(tmp_path, pair))
    assert says in str(error.value)


def request(folder, *evaluations):
    train = TrainFiles(files=[], samples=0, captions_per_sample=1, fingerprint=None)
    files = [e.model_copy(update={"files": [str(folder / "set.tar")]}) for e in evaluations]
    return DataRequest(
        index=str(folder / "cache"), file="chain.yaml", train=train, evaluation=files
    )


def test_braces_in_class_names_and_templates_do_no_harm(clip, tmp_path):
    names = ["a {0} b", "{}", "{name}"]
    pair = zero_shot(tmp_path, names, [(0, 0), (1, 1), (2, 2)], ("x {} {y}",))
    assert evaluator(pair)(clip) == pytest.approx(
        {"it": naive_zero_shot(clip, pair[1], names, ("x {} {y}",))[1]}
    )


def test_measuring_a_finished_artifact_is_what_training_measured(tmp_path):
    folder = tiny.data(tmp_path / "digits")
    task = tiny.task(tiny.spec(epochs=1), folder, tmp_path / "root")
    word, _ = tiny.train(task)
    torch.use_deterministic_algorithms(False)
    directory = tiny.artifact(task)
    found = measure(EvaluationTask(artifact=str(directory), data=task.data))
    assert (found.metrics, found.pictures) == (word.metrics, word.pictures)
    assert set(found.pictures) == {"top1", "r1"} and min(found.pictures.values()) > 0
    chain = tmp_path / "chain.yaml"
    chain.write_text(tiny.spec(epochs=1).model_dump_json(by_alias=True, exclude_unset=True))
    app = typer.Typer()
    app.command()(commands.evaluate)
    done = CliRunner().invoke(
        app, [str(directory), "-f", str(chain), "--data", str(folder), "-o", "json"]
    )
    assert json.loads(done.stdout) == word.metrics and set(word.metrics) > {
        "top1",
        "top1/top-5",
        "r1",
    }
    weights = directory / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(WorkError, match="sha256"):
        measure(EvaluationTask(artifact=str(directory), data=task.data))
    (directory / "manifest.json").unlink()  # still an open_clip folder, but of unknown origin
    for nothing in (directory, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no artifact \(no manifest\.json\)"):
            measure(EvaluationTask(artifact=str(nothing), data=task.data))
