from dataclasses import fields

import pytest

from utils.settings import Settings, parse, parser


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_those_of_vit_pytorch():
    s = parse([])
    assert (s.dataset, s.train_batch_size, s.eval_batch_size, s.eval_every) == ("cifar10", 512, 64, 100)
    assert (s.learning_rate, s.weight_decay, s.num_steps, s.warmup_steps) == (3e-2, 0, 10_000, 500)
    assert (s.decay_type, s.max_grad_norm, s.seed, s.gradient_accumulation_steps) == ("cosine", 1.0, 42, "auto")
    assert (s.local_rank, s.loss_scale, s.fp16_opt_level, s.output_dir) == (-1, 0, "O2", "output")


def test_every_flag_of_vit_pytorch_is_accepted_also_with_hyphens():
    line = ("--name a --dataset cifar100 --model_type ViT-L_16 --pretrained_dir x.npz --output_dir o --img_size 384 "
            "--train_batch_size 8 --eval_batch_size 4 --eval_every 10 --learning_rate 0.1 --weight_decay 0.01 "
            "--num_steps 50 --decay_type linear --warmup_steps 5 --max_grad_norm 2 --local_rank 1 --seed 7 "
            "--gradient_accumulation_steps 2 --fp16 --fp16_opt_level O1 --loss_scale 128 --num_workers 3")
    s = parse(line.split())
    assert s == parse(line.replace("_", "-").replace("ViT-L-16", "ViT-L_16").split())
    assert s.img_size == (384, 384) and s.fp16 and s.loss_scale == 128 and s.learning_rate == 0.1 and s.num_workers == 3


def test_momentum_is_stored_in_float32_unless_bfloat16_is_asked_for():
    assert parse([]).momentum_dtype == "float32" == parse(["--optimizer", "adamw"]).momentum_dtype
    assert parse(["--momentum-dtype", "bfloat16"]).momentum_dtype == "bfloat16"


def test_the_papers_recipe_fills_defaults_and_what_is_given_by_hand_wins():
    assert parse(["--recipe", "paper"]).img_size == (384, 384)
    assert parse(["--recipe", "paper"]).learning_rate == 0.01
    assert parse(["--recipe", "paper", "--model_type", "ViT-B_16-224"]).learning_rate == 0.01
    assert parse(["--recipe", "paper", "--pretrained_dir", "checkpoint/ViT-L_16.npz"]).learning_rate == 0.03
    assert parse(["--recipe", "paper", "--dataset", "cifar100"]).learning_rate == 0.03
    assert parse(["--recipe", "paper", "--learning_rate", "0.5", "--img_size", "224"]).learning_rate == 0.5
    assert parse(["--recipe", "paper", "--learning_rate", "0.5", "--img_size", "224,320"]).img_size == (224, 320)


def test_a_mistyped_flag_names_the_nearest_one(capsys):
    assert error_of(capsys, "--lr", "3") == "error: There is no flag --lr: did you mean --learning_rate?\n"
    assert error_of(capsys, "--epochs", "3") == "error: There is no flag --epochs: did you mean --num_epochs?\n"
    assert error_of(capsys, "--zebra", "3") == "error: There is no flag --zebra. See --help.\n"
    assert error_of(capsys, "photos") == "error: There is no argument 'photos' without a flag. See --help.\n"
    assert error_of(capsys, "--num_step", "3") == "error: There is no flag --num_step: did you mean --num_steps?\n"
    assert error_of(capsys, "--learning-rates=3") == (
        "error: There is no flag --learning_rates: did you mean --learning_rate?\n")


def test_recipes_fill_what_they_say_and_what_is_given_by_hand_wins():
    scratch = parse(["--recipe", "scratch"])
    assert (scratch.optimizer, scratch.learning_rate, scratch.weight_decay, scratch.max_grad_norm) == (
        "adamw", 1e-3, 0.05, 1.0)
    assert (scratch.pretrained_dir, scratch.num_epochs, scratch.train_batch_size, scratch.decay_type) == (
        "none", 50, 128, "cosine")
    assert (scratch.pad_crop, scratch.randaugment, scratch.magnitude) == (4, 2, 9)
    assert (scratch.mixup, scratch.cutmix) == (0.8, 1)
    assert (scratch.label_smoothing, scratch.drop_path, scratch.no_flip) == (0.1, 0.1, False)
    tutorial = parse(["--recipe", "tutorial"])
    assert (tutorial.model_type, tutorial.patch_proj, tutorial.optimizer, tutorial.learning_rate) == (
        "ViT-CIFAR", "linear", "adam", 1e-3)
    assert (tutorial.weight_decay, tutorial.train_batch_size, tutorial.num_epochs) == (5e-5, 256, 50)
    assert (tutorial.decay_type, tutorial.warmup_steps, tutorial.max_grad_norm, tutorial.pad_crop) == (
        "constant", 0, 0, 4)
    adam = parse(["--recipe", "finetune-adam"])
    assert (adam.optimizer, adam.learning_rate, adam.decay_type, adam.train_batch_size, adam.num_epochs, adam.img_size,
            adam.pretrained_dir) == ("adam", 1e-3, "cosine", 128, 10, (224, 224), None)
    by_hand = parse(["--recipe", "scratch", "--mixup", "0", "--num_steps", "77", "--train_batch_size", "32"])
    assert (by_hand.mixup, by_hand.num_steps, by_hand.num_epochs, by_hand.learning_rate) == (0, 77, 0, 2.5e-4)
    assert by_hand.warmup_steps == 4  # a twentieth
    assert parse(["--recipe", "scratch", "--min_area", "0.2"]).pad_crop == 0
    sgd = parse(["--recipe", "scratch", "--optimizer", "sgd"])
    assert (sgd.learning_rate, sgd.weight_decay) == (3e-2, 0.0)


def test_the_learners_command_trains_from_scratch_by_the_recipe_for_it():
    settings = parse(["--model", "base", "--num_epochs", "10", "--batch_size", "32"])
    assert (settings.model_type, settings.pretrained_dir, settings.recipe, settings.dataset) == (
        "ViT-B_16", "none", "scratch", "cifar10")
    assert (settings.train_batch_size, settings.num_epochs, settings.learning_rate) == (32, 10, 2.5e-4)
    assert [parse(["--model", name]).model_type for name in ("large", "huge")] == ["ViT-L_16", "ViT-H_14"]
    fine = parse(["--model", "base", "--pretrained_dir", "x.npz"])
    assert (fine.recipe, fine.pretrained_dir) == ("vit-pytorch", "x.npz")
    with pytest.raises(ValueError, match="--model and --model_type both name a model"):
        parse(["--model", "base", "--model_type", "ViT-L_16"])


def test_epochs_become_updates_when_the_number_of_images_is_known():
    settings = parse(["--num_epochs", "10", "--train_batch_size", "32"])
    steps = settings.in_steps(50_000)
    assert (steps.num_steps, steps.warmup_steps, steps.eval_every) == (15_625, 781, 0)  # 50,000 / 32 = 1562.5
    due = [step for step in range(1, 15_626) if steps.evaluates(step, 50_000)]
    assert due == [1_563, 3_125, 4_688, 6_250, 7_813, 9_375, 10_938, 12_500, 14_063, 15_625]
    assert parse(["--num_epochs", "0.5", "--train_batch_size", "100"]).in_steps(1000).num_steps == 5
    assert parse(["--num_epochs", "2", "--eval_every", "7", "--train_batch_size", "9"]).in_steps(90).eval_every == 7
    warm = parse(["--num_epochs", "2", "--warmup_steps", "3", "--train_batch_size", "9"]).in_steps(90)
    assert (warm.num_steps, warm.warmup_steps) == (20, 3)
    warm = parse(["--num_steps", "5", "--warmup_epochs", "0.2", "--train_batch_size", "9"]).in_steps(90)
    assert (warm.num_steps, warm.warmup_steps) == (5, 2)
    assert parse(["--num_epochs", "4", "--train_batch_size", "128"]).in_steps(40).num_steps == 1
    plain = parse(["--num_steps", "5"])
    assert [step for step in range(1, 301) if plain.evaluates(step, 90)] == [100, 200, 300]
    assert plain.in_steps(90) == plain
    with pytest.raises(ValueError, match="--num_epochs is 0"):
        parse(["--recipe", "scratch", "--num_epochs", "0"])
    for flags in (["--num_steps", "3", "--num_epochs", "1"], ["--warmup_steps", "3", "--warmup_epochs", "1"]):
        with pytest.raises(ValueError, match=f"{flags[0]} and {flags[2]} both say how long"):
            parse(flags)


@pytest.mark.parametrize("argv, words", [
    (["--learning_rate", "abc"], "--learning_rate: invalid float value: 'abc'"),
    (["--img_size", "big"], "'big' is no image size: give 224"), (["--img_size", "0"], "'0' is no image size"),
    (["--gradient_accumulation_steps", "all"], "'all' is no number of micro-batches: give 1 or more, or auto"),
    (["--gradient_accumulation_steps", "1.5"], "'1.5' is no number of micro-batches"),
    (["--decay_type", "step"], "invalid choice: 'step'"),
    (["--momentum_dtype", "float16"], "invalid choice: 'float16'"), (["--num_steps"], "expected one argument")])
def test_a_wrong_value_is_one_line(capsys, argv, words):
    message = error_of(capsys, *argv)
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize("values, words", [
    (dict(train_batch_size=0), "--train_batch_size is 0; it must be at least 1"),
    (dict(train_batch_size=10, gradient_accumulation_steps=3),
     "--train_batch_size 10 cannot be split into --gradient_accumulation_steps 3 equal parts"),
    (dict(gradient_accumulation_steps=0), "--gradient_accumulation_steps is 0; it must be at least 1"),
    (dict(learning_rate=-1.0), "--learning_rate is -1.0; it must be 0 or more"),
    (dict(learning_rate=float("nan")), "--learning_rate is nan"), (dict(val_fraction=1.0), "--val_fraction is 1.0"),
    (dict(dropout=1.5), "--dropout is 1.5; it must lie between 0 and 1"), (dict(min_area=2.0), "--min_area is 2.0"),
    (dict(name="/abs"), "--name '/abs' would leave"), (dict(local_rank=-2), "--local_rank is -2"),
    (dict(momentum_dtype="bfloat16", optimizer="adam"),
     "--momentum_dtype bfloat16 is for sgd's momentum; --optimizer is adam."),
    (dict(in_chans=0), "--in_chans is 0; it must be at least 1"), (dict(eval_every=-1), "--eval_every is -1"),
    (dict(magnitude=31), "--magnitude is 31; it must be 0 to 30"), (dict(ema=1.0), "--ema is 1.0"),
    (dict(num_epochs=float("inf")), "--num_epochs is inf; it must lie between 0 and 1000000"),
    (dict(ema=0.9, swa=0.5), "--ema and --swa are two averages of the same weights"),
    (dict(patch_size=0), "--patch_size is 0; it must be at least 1"),
    (dict(fp16=True, bf16=True), "bf16 and fp16. Choose one")])
def test_settings_that_no_run_can_have_are_refused(values, words):
    with pytest.raises(ValueError) as error:
        Settings(**values)
    assert words in str(error.value)


def test_help_is_grouped_names_every_default_and_stays_short():
    text = parser().format_help()
    lines = text.splitlines()
    assert len(lines) <= 95 and max(map(len, lines)) <= 150
    assert [line[:-1] for line in lines if line.endswith(":") and " " not in line] == [
        "options", "data", "model", "training", "device", "output"]
    switches = {"-h,", *(f"--{f.name}" for f in fields(Settings) if f.default is False)}
    flags = [line if "  " in line.strip() else line + after for line, after in zip(lines, [*lines[1:], ""])
             if line.strip().startswith("-")]  # a long name has a line of its own
    assert len(flags) == len(fields(Settings)) + 1
    assert all("(default: " in line for line in flags if line.split()[0] not in switches)
