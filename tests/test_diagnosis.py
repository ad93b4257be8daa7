"""Sentences about what goes wrong in silence: said of bad runs, once, and not of sane ones."""

import json

import pytest
import torch

from utils.data import Split
from utils.diagnosis import Diagnosis, diagnose
from utils.settings import Settings

# Recorded: classes, warm-up, steps, share of the largest class, then for each update of 8 images its loss, and how many
# of them were given the class predicted most often. Digits (a small ViT from scratch with AdamW at 1e-3, which begins
# to learn after 130 updates; ViT-demo.npz with SGD at 1e-5 and 3) and photographs of two classes (SGD at 0.03; at 3e-3
# where 90 % are of one).
RECORDED = {
    "slow": (10, 25, 500, 0.1, """
        2.303 2.303 2.302 2.303 2.302 2.297 2.298 2.31 2.298 2.284 2.309 2.316 2.307 2.327 2.312 2.293 2.291 2.299 2.294
        2.314 2.32 2.33 2.319 2.315 2.32 2.292 2.316 2.348 2.291 2.347 2.327 2.317 2.301 2.331 2.294 2.344 2.281 2.273
        2.329 2.349 2.253 2.321 2.431 2.395 2.332 2.335 2.3 2.286 2.248 2.304 2.249 2.363 2.29 2.3 2.268 2.254 2.235
        2.331 2.321 2.391 2.271 2.316 2.242 2.319 2.297 2.392 2.371 2.356 2.418 2.323 2.394 2.363 2.261 2.26 2.385 2.311
        2.353 2.431 2.258 2.269 2.266 2.264 2.358 2.317 2.269 2.328 2.281 2.271 2.259 2.374 2.279 2.28 2.251 2.356 2.282
        2.325 2.349 2.344 2.331 2.375 2.379 2.294 2.291 2.275 2.272 2.338 2.267 2.231 2.32 2.301 2.293 2.231 2.325 2.281
        2.313 2.335 2.137 2.281 2.26 2.359 2.242 2.304 2.181 2.23 2.271 2.364 2.198 2.35 2.213 2.282 2.106 2.259 2.2
        2.262 2.154 2.267 2.333 2.292 2.195 2.22 2.025 2.253 2.223 2.257 2.133 2.179 2.271 2.156 2.012 2.265 2.222 1.978
        2.22 2.071 2.194 2.132 2.048 2.17 2.166 2.057 1.992 2.222 2.307 2.143 2.175 2.029 1.981 2.161 1.738 2.115 2.113
        2.387 2.53 2.397 2.242 2.103 2.008 2.284 1.927 1.868 2.192 2.082 2.014 1.746 2.054 2.216 2.374 2.246 2.321 2.256
        2.078 1.906 2.225 2.131 1.745 2.188 1.966 1.92 2.112 2.128 1.977 2.145 2.238 2.266 2.114 2.018 2.091 2.393 2.538
        1.953 2.012 1.807 1.986 2.011 2.288 2.06 2.099 2.104 1.846 1.798 2.28 1.871 1.761 2.018 2.031
    """, """
        8876765547888888886888877788888888588748888888888888677888888888886688844888887757788877784654566776666553536546
        4333445686556543234334266544576533333444343435444444342333534647433443333334333433353334433332223333232332423342
        3
    """),
    "noisy": (2, 40, 240, 0.5, """
        0.693 0.693 0.693 0.694 0.692 0.691 0.693 0.694 0.657 0.639 0.616 0.767 0.526 0.584 0.574 0.827 0.323 0.83 0.719
        0.71 0.769 0.249 0.518 0.574 0.619 0.665 0.601 0.96 0.61 0.728 0.688 0.371 0.419 0.598 0.199 1.194 0.649 0.647
        0.594 0.842 0.812 0.378 0.205 0.246 0.345 0.454 0.367 0.287 0.521 0.068 0.644 0.303 0.632 0.392 0.341 0.37 0.27
        0.658 0.125 0.234 0.295 0.485 0.534 0.735 0.2 0.468 0.092 0.073 0.201 0.222 0.048 0.762 0.627 0.118 0.049 0.062
        0.548 0.009 0.343 0.3 0.443 0.029 0.889 0.045 0.093 0.647 0.076 0.045 1.635 0.062 0.92 0.637 1.809 0.009 1.357
        0.03 0.192 0.633 1.428 0.08 0.791 0.638 0.16 0.076 0.072 0.411 0.096 0.514 0.897 0.921 0.655 0.531 0.413 0.189
        0.487 1.248 0.615 1.235 0.373 0.361 0.192 0.656 0.104 0.862 0.595 0.146 0.547 0.362 0.32 0.382 0.107 0.338 0.299
        0.238 0.086 0.17 0.844 0.716 0.094 0.033
    """, """
        8857886767876776846465768677856677556445464474544446555666756744455445555564554555757644655454655474654454655554
        5747856554655654455655646455
    """),
    "unbalanced": (2, 30, 230, 0.9, """
        0.693 0.693 0.693 0.69 0.688 0.684 0.682 0.651 0.643 0.631 0.621 0.591 0.535 0.518 0.671 0.432 0.591 0.512 0.328
        0.605 0.413 0.445 0.244 0.181 0.783 0.374 0.352 0.608 0.35 0.334 0.196 0.366 0.354 0.434 0.075 0.068 0.066 0.634
        0.32 0.059 0.482 0.056 0.314 0.362 0.329 0.769 0.351 0.419 0.365 0.258 0.516 0.371 0.32 0.134 0.234 0.233 0.351
        0.093 0.238 0.297 0.482 0.293 0.194 0.091 0.216 0.07 0.138 0.413 0.248 0.552 0.077 0.058 0.212 0.091 0.508 0.304
        0.041 0.329 0.624 0.043 0.066 0.723 0.069 0.06 0.542 0.605 0.273 0.264 0.341 0.04 0.043 0.994 0.241 0.032 0.514
        0.432 0.088 0.231 0.23 0.239 0.234 0.062 0.257 0.257 0.438 0.09 0.146 0.197 0.233 0.079 0.082 0.06 0.422 0.033
        0.45 0.232 0.507 0.075 0.042 0.195 0.015 0.069 0.093 0.286 0.029 0.139 0.724 0.061 0.058 0.123
    """, """
        8888878878678888678788888888868887888888888888888888887888888888888888888888888888888888888888888888888888778888
        887888888788887888
    """),
    "rate too low": (10, 30, 230, 0.1, """
        2.303 2.303 2.303 2.303 2.303 2.303 2.303 2.303 2.303 2.302 2.303 2.303 2.303 2.303 2.303 2.302 2.303 2.302
        2.302 2.302 2.302 2.303 2.302 2.302 2.302 2.303 2.303 2.302 2.302 2.302 2.303 2.302 2.302 2.302 2.302 2.302
        2.302 2.302 2.303 2.303 2.302 2.303 2.304 2.304 2.303 2.302 2.302 2.304 2.303 2.302 2.303 2.301 2.302 2.301
        2.302 2.301 2.302 2.302 2.303 2.302 2.301 2.301 2.3 2.301 2.301 2.302 2.302 2.301 2.303 2.301 2.301 2.302 2.302
        2.301 2.3 2.301 2.301 2.301 2.301 2.303 2.301 2.301 2.301 2.301 2.302 2.301 2.301 2.303 2.301 2.301 2.301 2.301
        2.301 2.299 2.299 2.3 2.3 2.302 2.3 2.301 2.303 2.3 2.299 2.301 2.302 2.302 2.298 2.302 2.299 2.299 2.3 2.3
        2.303 2.299 2.3 2.3 2.296 2.3 2.299 2.3 2.302 2.3 2.299 2.299 2.302 2.302 2.299 2.302 2.3 2.3
    """, """
        8886475556787878878685543564533467353445454453523444544343434443447333543345364342523343543343433335353445444244
        334443335533333364
    """),
    "rate too high": (10, 30, 230, 0.1, """
        2.303 2.303 2.185 3.463 2.617 1.819 3.937 4.954 6.398 5.861 8.51 13.975 9.204 10.876 16.424 25.31 19.703 29.032
        19.993 41.563 53.596 19.446 25.271 31.333 40.415 27.819 19.84 41.19 34.5 22.098 13.399 50.564 30.697 12.712
        54.505 40.55 50.315 38.481 57.068 34.83 44.687 47.118 60.096 55.639 42.185 51.008 38.345 123 120 73.509 57.711
        44.312 60.738 21.84 63.344 62.238 96.09 72.129 78.536 87.303 112 154 34.916 28.141 52.388 36.818 126 55.128
        61.977 112 57.077 90.845 68.062 125 22.806 45.957 51.783 89.726 14.317 110 65.139 65.988 62.125 125 143 56.764
        143 85.305 41.377 57.529 67.196 70.851 45.862 51.425 25.02 48.755 70.144 64.332 59.733 42.398 58.824 69.182
        27.816 19.686 70.91 58.445 62.263 14.837 39.732 96.295 93.538 28.418 54.377 50.4 43.586 21.094 42.697 13.919
        27.222 57.992 59.55 39.163 54.877 36.08 46.1 19.9 28.305 18.858 26.6 21.723
    """, """
        8885345668666588888688568888885888888888888888888888888888888888888888887848888888888888888888888888888888868888
        888888888888888888
    """),
    "shuffled labels": (2, 30, 230, 0.5, """
        0.693 0.693 0.694 0.691 0.695 0.697 0.722 0.697 0.702 0.679 0.735 0.771 0.676 0.718 0.61 0.747 0.629 0.829 0.838
        0.837 0.695 0.679 0.792 0.61 0.728 0.671 0.89 0.808 0.656 0.662 0.731 0.7 0.718 0.685 0.543 1.072 1.145 0.857
        0.617 0.795 0.639 0.702 0.687 0.727 0.728 0.76 0.828 0.757 0.73 0.729 0.779 0.815 0.755 0.66 0.817 0.716 0.704
        0.966 0.713 1.038 0.764 0.664 0.933 0.803 1.062 0.726 0.732 0.652 0.909 0.95 1.028 0.731 0.681 0.649 0.941 0.609
        1.097 0.771 0.682 0.7 0.916 0.973 1.298 1.238 0.728 0.869 0.661 0.932 1.245 0.5 0.882 0.841 1.369 0.769 0.814
        0.644 0.608 0.758 1.567 0.957 0.8 0.74 0.894 0.947 0.707 0.68 0.74 0.78 0.598 0.835 0.81 0.731 0.84 0.802 0.688
        0.845 0.718 0.697 0.661 0.74 0.808 0.634 0.583 0.743 0.969 0.756 0.698 0.709 0.738 0.718
    """, """
        8878878668775455876866868564877654788876657878868568767578888788884888886788888788888888888888888888888888888888
        588886488887876688
    """),
}


def recorded(name):
    """A diagnosis for the run of this name, and its updates: (step, loss, share)."""
    classes, warmup, num_steps, largest, losses, counts = RECORDED[name]
    updates = [(step, float(loss), int(count) / 8)
               for step, (loss, count) in enumerate(zip(losses.split(), "".join(counts.split())), start=1)]
    return Diagnosis(classes, warmup, num_steps, 8, largest_class_share=largest), updates


def follow(diagnosis, updates):
    return [(step, sentence) for step, loss, share in updates
            for sentence in diagnosis.update(step, loss, 0.5, True, 1.0, share)]


def overflows(diagnosis, steps, scale=2.0**16, until=2000, halves=True):
    """float16: the updates of these numbers overflow; what is said."""
    said = []
    for step in range(1, until):
        over = step in steps
        said += diagnosis.update(step, float("nan") if over else 1 / step, 0.5, not over, scale, 0.3)
        scale /= 2 if over and halves else 1
    return said


@pytest.mark.parametrize("name", ["slow", "noisy", "unbalanced"])
def test_nothing_is_said_of_sane_runs(name):
    diagnosis, updates = recorded(name)
    assert len(updates) - RECORDED[name][1] >= 10 * diagnosis.block_steps  # as far as a first sentence
    assert follow(diagnosis, updates) == []


@pytest.mark.parametrize("name, step, words", [
    ("rate too low", 130, "has not moved: 2.303 at first, 2.301 over the last 100 updates. Try ten times the --lear"),
    ("rate too high", 130, "no better than at first: 2.303 then, 58.25 over the last 100 updates. Try a tenth of th"),
    ("shuffled labels", 130, "no better than at first: 0.693 then, 0.8037 over the last 100 updates. Do the label")])
def test_a_loss_that_does_not_move_is_said_as_soon_as_it_is_sure(name, step, words):
    said = follow(*recorded(name))
    assert said[0][0] == step and words in said[0][1]
    assert sum("loss" in sentence.lower() for _, sentence in said) == 1


def test_of_mixed_images_only_a_loss_that_grows_is_said():
    for name, words in (("rate too low", []), ("rate too high", ["no better than at first"])):
        diagnosis, updates = recorded(name)
        diagnosis.mixed = True
        said = [sentence for _, sentence in follow(diagnosis, updates) if "loss" in sentence.lower()]
        assert len(said) == len(words) and all(word in sentence for word, sentence in zip(words, said))
    one, other = (diagnose(Settings(mixup=alpha), Split(torch.zeros(4, 3, 8, 8), torch.arange(4) % 2, ("a", "b")), 0)
                  for alpha in (0.8, 0.0))
    assert one.mixed and not other.mixed


def test_predictions_of_one_class_are_said():
    diagnosis, updates = recorded("rate too high")
    said = [sentence for _, sentence in follow(diagnosis, updates) if "collapsed" in sentence]
    assert len(said) == 1 and "in the last 100 updates 99% of a batch were given the same class" in said[0]


@pytest.mark.parametrize("batch_size, largest, multi_label", [(8, 0.99, False), (2, 0.1, False), (8, 0.1, True)])
def test_one_class_is_no_fault_where_the_set_is_of_one_or_the_batch_tells_nothing(batch_size, largest, multi_label):
    diagnosis = Diagnosis(10, 10, 1000, batch_size, multi_label, largest_class_share=largest)
    assert follow(diagnosis, [(step, 2.3 / step, 1.0) for step in range(1, 1000)]) == []


def test_each_kind_is_said_once_however_long_it_lasts():
    diagnosis = Diagnosis(10, 10, 2000, 8)
    said = [sentence for _, sentence in follow(diagnosis, [(step, 2.3, 1.0) for step in range(1, 2000)])]
    assert len(said) == 2 and "not moved" in said[0] and "collapsed" in said[1]


def test_a_loss_that_comes_back_to_where_it_was_is_said_too():
    diagnosis = Diagnosis(10, 10, 2000, 8)
    assert follow(diagnosis, [(step, 2.3 / step, 0.2) for step in range(1, 500)]) == []
    said = follow(diagnosis, [(step, 4.0, 0.2) for step in range(500, 700)])
    assert len(said) == 1 and "no better than at first: 2.3 then" in said[0][1]


def test_nothing_is_said_before_the_warm_up_is_over_or_before_classes_were_seen():
    still = [(step, 6.9, 0.2) for step in range(1, 400)]
    assert follow(Diagnosis(10, 500, 600, 8), still) == []
    assert follow(Diagnosis(1000, 10, 5000, 8), still) == []       # 3 images of each class
    assert follow(Diagnosis(1000, 10, 5000, 512), still)[0][0] == 210


def test_short_runs_are_judged_over_fewer_updates():
    assert follow(Diagnosis(10, 5, 65, 32), [(step, 2.3, 0.2) for step in range(1, 65)])[0][0] == 55


def test_a_loss_scale_that_keeps_falling_is_said_once():
    said = overflows(Diagnosis(10, 10, 2000, 8), range(150, 1500, 100))
    assert len(said) == 1 and "6 of the last 501 updates overflowed" in said[0]
    assert "the loss scale fell from 65536 to 2048" in said[0] and "--precision bf16" in said[0]


def test_a_fixed_loss_scale_is_not_said_to_fall():
    said = overflows(Diagnosis(10, 10, 2000, 8), range(150, 250, 10), scale=128.0, halves=False)
    assert len(said) == 1 and "were skipped; at loss scale 128. Try" in said[0]


@pytest.mark.parametrize("steps", [range(1, 13), (3, 4, 10, 12, 16, 18, 22), (43, 174), range(200, 20000, 500)])
def test_the_search_for_a_loss_scale_and_a_retry_now_and_then_are_usual(steps):
    assert overflows(Diagnosis(10, 10, 20000, 8), steps, until=5000) == []


def waits(diagnosis, times):
    return [sentence for step, pair in enumerate(times, start=1) for sentence in diagnosis.waited(step, *pair)]


# Recorded seconds of steps after the 20th (32 photographs of 224 px to a tiny model): one process decodes; two decode.
STARVED = [(.014, .039), (.016, .039), (.011, .035), (.012, .036), (.014, .038), (.012, .032), (.015, .042)]
FED = [(.003, .038), (.014, .042), (.004, .037), (.009, .033), (.008, .037), (.008, .031), (.011, .038)]


def test_a_device_that_waits_for_images_is_said_with_the_share_and_what_helps(monkeypatch):
    monkeypatch.setattr("utils.diagnosis.os.sched_getaffinity", lambda _: range(16), raising=False)
    said = waits(Diagnosis(10, 10, 1000, 32, workers=1), STARVED * 30)
    assert len(said) == 1 and "For 35% of the last 50 steps' time" in said[0] and "Try --num_workers 16, or" in said[0]
    assert "on a faster disk" in waits(Diagnosis(10, 10, 1000, 32, workers=16), STARVED * 30)[0]
    in_memory = waits(Diagnosis(10, 10, 1000, 32), STARVED * 30)[0]
    assert "disk" not in in_memory and "num_workers" not in in_memory
    assert waits(Diagnosis(10, 10, 1000, 32, workers=2), FED * 30) == []


def test_the_first_steps_may_wait_and_so_may_one_alone():
    assert waits(Diagnosis(10, 10, 1000, 32), [(5.0, 5.1)] * 20 + FED * 30) == []
    assert waits(Diagnosis(10, 10, 1000, 32), [(0.0, 1.0)] * 100 + [(150.0, 151.0)] + [(0.0, 1.0)] * 100) == []


@pytest.mark.parametrize("name", RECORDED)
def test_a_run_that_is_continued_at_any_step_says_what_the_unbroken_one_says(name):
    diagnosis, updates = recorded(name)
    whole = follow(diagnosis, updates)
    for cut in range(0, len(updates), 3):
        before, after = recorded(name)[0], recorded(name)[0]
        said = follow(before, updates[:cut])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))  # nothing but plain values
        assert said + follow(after, updates[cut:]) == whole
        assert after.state_dict() == diagnosis.state_dict()


def test_the_state_is_a_copy_and_holds_the_overflows():
    steps = range(150, 1500, 100)
    for cut in (120, 300, 600, 800):
        before, after = Diagnosis(10, 10, 2000, 8), Diagnosis(10, 10, 2000, 8)
        said = overflows(before, steps, until=cut)
        after.load_state_dict(before.state_dict())
        kept = json.dumps(after.state_dict())
        overflows(before, steps, until=2000)
        assert json.dumps(after.state_dict()) == kept
        for step in range(cut, 2000):
            said += after.update(step, 1 / step, 0.5, step not in steps, 1024.0, 0.3)
        assert len(said) == 1
