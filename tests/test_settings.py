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
    assert error_of(capsys, "--epochs", "3") == "error: There is no flag --epochs: did you mean --num_steps?\n"
    assert error_of(capsys, "--zebra", "3") == "error: There is no flag --zebra. See --help.\n"
    assert error_of(capsys, "photos") == "error: There is no argument 'photos' without a flag. See --help.\n"
    assert error_of(capsys, "--num_step", "3") == "error: There is no flag --num_step: did you mean --num_steps?\n"
    assert error_of(capsys, "--learning-rates=3") == (
        "error: There is no flag --learning_rates: did you mean --learning_rate?\n")


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
    (dict(in_chans=0), "--in_chans is 0; it must be at least 1"), (dict(eval_every=0), "--eval_every is 0"),
    (dict(fp16=True, bf16=True), "bf16 and fp16. Choose one")])
def test_settings_that_no_run_can_have_are_refused(values, words):
    with pytest.raises(ValueError) as error:
        Settings(**values)
    assert words in str(error.value)


def test_help_is_grouped_names_every_default_and_fits_two_screens():
    text = parser().format_help()
    lines = text.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 150
    assert [line[:-1] for line in lines if line.endswith(":") and " " not in line] == [
        "options", "data", "model", "training", "device", "output"]
    switches = {"-h,", *(f"--{f.name}" for f in fields(Settings) if f.default is False)}
    flags = [line for line in lines if line.strip().startswith("-")]
    assert len(flags) == len(fields(Settings)) + 1
    assert all("(default: " in line for line in flags if line.split()[0] not in switches)
