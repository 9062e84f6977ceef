"""Tests with generated inputs: command lines, replay contents and damaged checkpoints."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import runs
import torch
from conftest import CPU, TASK, FakeEnvs, same, stack_expert, start
from hypothesis import HealthCheck, given, settings

import bmpc

pytestmark = pytest.mark.filterwarnings("ignore")
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def fuzz(examples):
    """Return hypothesis settings: reproducible examples and no deadline."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)


# --- command lines

BASE = ["--task", "toy:Toy-v0", *runs.TINY, "--steps", "60", "--eval-freq", "0"]
CHOICES = dict(  # values that are valid in all combinations, together with BASE
    num_envs=[1, 2, 3], action_repeat=[1, 3], episodic=[False, True], discount=[0.5, 1.0], utd_ratio=[0.25, 1, 3.3],
    batch_size=[4, 9], buffer_size=[36, 10_000], enc_lr_scale=[0.3, 1], grad_clip_norm=[0.01, 20], rho=[0.1, 1, 2],
    normalize_rho_weights=[False, True], td_horizon=[1, 3], consistency_coef=[0, 20], entropy_coef=[0, 1e-2],
    kl_reduction=["mean", "sum"], model_size=[1, 5], enc_dim=[8, 24], mlp_dim=[8, 24], latent_dim=[8, 24],
    num_enc_layers=[1, 2, 3], simnorm_dim=[2, 4, 8], num_q=[1, 3], num_bins=[2, 21], dropout=[0, 0.5],
    horizon=[1, 2, 4], iterations=[1, 3], num_samples=[8, 16], num_elites=[1, 8], num_pi_trajs=[0, 1, 7],
    temperature=[0.01, 100], eval_sample_elite=[False, True], reanalyze_interval=[0, 1], reanalyze_batch_size=[1, 4],
    reanalyze_horizon=[1, 5], reanalyze_log_std_min=[-2], expert_std_min=[0, 0.5], reanalyze_use_chosen_action=[False],
    chosen_action_noise=[False], initial_expert_from_behavior=[False, True], num_rollouts=[1, 4],
    imagine_initial_source=["replay_rollout", "replay_true"], td_target_initial_source=["replay_true", "same"],
    encoder_consistency_coef=[0, 1], td_target_use_ema_policy=[False, True], policy_trust_region_coef=[0, 1],
)  # fmt: skip


VALID = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in CHOICES.items()})


@fuzz(25)
@given(VALID)
def test_valid_command_lines_act_and_learn(changes):
    args, _ = bmpc.resolve_args(bmpc.parse_args(BASE + runs.words(changes)))
    envs = FakeEnvs([7] * args.num_envs)
    run = start(args, envs)
    for _ in range(20):
        bmpc.store_step(run, envs, *bmpc.random_action(args, TASK.action_dim, run.make_generator("act")), run.prev_mean)
    before = [x.clone() for x in run.model.parameters()]
    bmpc.train_step(run, pretraining=True)
    bmpc.train_step(run, pretraining=False)
    action, expert, mean, metrics = bmpc.act(
        run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator
    )
    run.accumulate_metrics(metrics)
    assert action.shape == (args.num_envs, 2) and action.abs().max() <= 1
    assert stack_expert(expert).isfinite().all() and mean.isfinite().all()
    assert {"losses/kl", "planner/value"} <= run.mean_metrics().keys()  # raises RunError if one is not finite
    assert any(not torch.equal(x, y) for x, y in zip(before, run.model.parameters(), strict=True))


INVALID = {
    "num_envs": [0, -1], "batch_size": [0, 3], "buffer_size": [0, 7], "horizon": [0, 13], "num_elites": [0, 17],
    "num_pi_trajs": [-1, 16], "latent_dim": [0, 31], "simnorm_dim": [0, 5], "learning_starts": [0, 3], "num_bins": [1],
    "lr": [0, -1, "nan", "inf"], "tau": [0, 1.5, "nan"], "discount": [0, 1.01, "nan"], "dropout": [1, -0.1],
    "utd_ratio": [0, -1, "nan", "inf"], "vmin": [10, "nan", "-inf"], "vmax": [-10.5, "inf"], "log_std_min": [2, "nan"],
    "min_std": [0, 3, "nan"], "max_std": ["inf"], "rho": [0, "nan"], "temperature": [0], "total_timesteps": [0, -5],
    "num_samples": [0, 3, 4], "iterations": [0], "td_horizon": [0], "num_rollouts": [0], "grad_clip_norm": [0],
    "eval_freq": [-1], "log_freq": [-1], "checkpoint_freq": [-1], "eval_episodes": [0], "seed": [-1, 2**32],
    "reanalyze_interval": [-1], "reanalyze_batch_size": [0, 17], "reanalyze_horizon": [0], "action_repeat": [0],
    "entropy_coef": [-1, "nan"], "consistency_coef": ["inf"], "policy_ema_tau": [0, 2], "enc_dim": [0], "num_q": [0],
    "reanalyze_log_std_min": ["nan", 2], "reanalyze_log_std_max": ["inf", -6], "discount_min": [0.999],
    "env_id": ["dog-fly", "Toy-v9", "toy:Toy-v9", "nomodule:Toy-v0", "CartPole-v1", "", "-", "lqr-lqr_2_1"],
    "env_kwargs": ["{", "[1]", '{"no": 1}'], "device": ["tpu", "cuda:99", "meta"], "run_name": ["a/b", "../a"],
    "resume": ["nowhere"], "evaluate": ["nowhere"],
    # Values that tyro rejects. A space makes a key unique
    "kl_reduction": ["max"], "model_size": [2, "big"], "seed ": ["one"], "lr ": ["fast"], "no_such_flag": [1],
}  # fmt: skip
# What an error message contains instead of the flag
MESSAGES = {"env_kwargs": "cannot be made", "resume": "holds no", "evaluate": "holds no"}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_values_are_rejected(tmp_path, monkeypatch, capsys, name):
    """The exit code is 2, the error is one line that names the flag, and no file is created."""
    monkeypatch.chdir(tmp_path)
    for value in INVALID[name]:
        from_tyro = False
        try:
            code = bmpc.main(BASE + runs.words({name.strip(): value}))
        except SystemExit as e:
            from_tyro = True
            code = e.code
        output = capsys.readouterr()
        # Only this error comes after the line about simulators: they must be forked before CUDA is used
        expected_lines = 1 if value == "cuda:99" else 0
        assert code == 2 and not list(Path.cwd().iterdir()) and output.out.count("\n") == expected_lines
        if not from_tyro:
            assert output.err.count("\n") == 1 and output.err.startswith("bmpc.py: error: "), output.err
        flag = "--" + name.strip().replace("_", "-")
        named = value or "cannot be made" if name == "env_id" else MESSAGES.get(name, flag)  # the task, or the flag
        assert flag in output.err or named in output.err, output.err


VALUES = st.one_of(
    *(st.integers(-(2**70), 2**70), st.integers(-3, 40), st.floats(), st.floats(-3, 3), st.text(max_size=5), st.none())
).map(str)
FIELDS = [field.name for field in bmpc.dataclasses.fields(bmpc.Args)]


@fuzz(40)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_random_values_are_accepted_or_rejected(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    try:
        bmpc.setup_torch(bmpc.resolve_args(bmpc.parse_args(BASE + runs.words(changes)))[0])
    except bmpc.UsageError as e:
        assert "\n" not in str(e), changes
    except SystemExit as e:  # from tyro
        assert e.code in (0, 2), changes
    assert not list(tmp_path.iterdir())


# --- replay


@fuzz(60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 26), st.integers(1, 60), st.integers(0, 99))
def test_replay_buffer_matches_the_list_of_steps(E, T, spare, steps, seed):
    """Each valid window is sampled with the same probability, also after the buffer is saved and loaded."""
    C = T + spare
    rng = np.random.default_rng(seed)
    args = bmpc.Args(num_envs=E, buffer_size=E * C + E - 1, horizon=T)
    make_buffer = lambda: bmpc.ReplayBuffer(args, bmpc.TaskInfo(1, 1, None), CPU)
    buffer = make_buffer()
    rows = torch.from_numpy(rng.random((steps, E, 7), np.float32))
    ended = rng.random((steps, E)) < rng.choice([0, 0.1, 0.3, 1])
    episode = ended.cumsum(0) - ended  # number of the episode of each row
    for step in range(steps):
        obs, action, expert, reward, terminated, next_obs = rows[step].split([1, 1, 2, 1, 1, 1], 1)
        buffer.add(
            obs,
            action,
            bmpc.Expert(*expert.split(1, 1)),
            reward[:, 0],
            terminated[:, 0],
            next_obs,
            ended[step],
            np.zeros(E, bool),
        )
        if step % 11 == 10:
            state = buffer.state_dict()
            buffer = make_buffer()
            buffer.load_state_dict(state)
            assert len(state["rows"]) == min(step + 1, C) and same(buffer.state_dict(), state)
        oldest = max(0, step + 1 - C)
        # A window is valid if its first and last rows belong to the same episode
        last_episode = episode[oldest : step + 1][T - 1 :]
        first, env = np.nonzero(episode[oldest:][: len(last_episode)] == last_episode)
        if not len(first):
            with pytest.raises(bmpc.UsageError, match="no episode in the replay buffer"):
                buffer.sample(np.zeros(1))
            continue
        u = (np.arange(3 * len(first)) + 0.5) / (3 * len(first))  # samples each window three times
        u[0], u[-1] = 0.0, 1 - 2**-53  # also at the ends of [0, 1)
        batch = buffer.sample(u)
        slots, envs = np.divmod(batch.index.numpy(), E)
        steps_sampled = step - (step - slots) % C  # the last step that was written to each slot
        assert sorted(zip(steps_sampled[0], envs[0])) == sorted([*zip(oldest + first, env)] * 3)
        assert (steps_sampled == steps_sampled[0] + np.arange(T)[:, None]).all() and (envs == envs[0]).all()
        columns = [batch.obs, batch.action, *batch.expert, batch.reward[:, :, None]]
        columns += [batch.terminated[:, :, None], batch.next_obs]
        assert torch.equal(torch.cat(columns, 2), rows[steps_sampled, envs])
    assert buffer.episode_step.tolist() == (episode == ended.sum(0)).sum(0).tolist()


# --- checkpoints


def test_damaged_checkpoint_is_rejected_or_equal(tmp_path):
    """One bit is flipped (bit 0 to 7), or the file is truncated (bit 8)."""
    bmpc.save_checkpoint(bmpc.Run(*bmpc.resolve_args(bmpc.parse_args(BASE)), CPU), tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    intact = bmpc.read_checkpoint(tmp_path)

    @fuzz(60)
    @given(st.integers(0, len(content) - 1), st.integers(0, 8))
    def check(position, bit):
        damaged = content[:position]
        if bit < 8:
            damaged += bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]
        path.write_bytes(damaged)
        try:
            assert same(bmpc.read_checkpoint(tmp_path), intact), position
        except bmpc.RunError as e:
            assert "checkpoint.pt cannot be used" in str(e) and "\n" not in str(e)

    check()
