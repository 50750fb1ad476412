"""What a user would pick instead of this library, on the digits' U-Net: three loops for ``side_by_side.py``.

Each has ``networks``, the modules of its roles, and ``update()``, which updates the student once.
"""

from copy import deepcopy

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import mse_loss

from rdm_rl.digits.students import LORA_RANK, training_prompts
from rdm_rl.families.sd import StableDiffusionFamily


class Contender:
    """What the others share: networks, prompts, and the way to make one trained copy and its optimiser."""

    def __init__(self, pipeline, batch, lora):
        self.batch, self.lora, self.teacher = batch, lora, pipeline.unet.requires_grad_(False).eval()
        self.shape = (batch, self.teacher.config.in_channels, *[self.teacher.config.sample_size] * 2)
        prompts = [row["prompt"] for row in training_prompts()]
        with torch.no_grad():
            self.embeddings = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        self.alphas = pipeline.scheduler.alphas_cumprod.sqrt()
        self.sigmas = (1 - pipeline.scheduler.alphas_cumprod).sqrt()

    def copy_to_train(self):
        network = deepcopy(self.teacher)
        if self.lora:
            targets = list(StableDiffusionFamily.lora_targets)
            network.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
        else:
            network.requires_grad_(True)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        return network, torch.optim.AdamW(trained, lr=1e-6, fused=True)  # As fast as torch has it.

    def prompts(self):
        return self.embeddings[torch.randint(len(self.embeddings), (self.batch,))]

    def predict(self, network, x, t, prompts):
        """The network's v and its x_0, for times (N,)."""
        v = network(x, t, encoder_hidden_states=prompts, return_dict=False)[0]
        alpha, sigma = self.levels(t)
        return v, alpha * x - sigma * v

    def levels(self, t):
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def renoised(self, x_0, t):
        noise = torch.randn_like(x_0)
        alpha, sigma = self.levels(t)
        return alpha * x_0 + sigma * noise, noise


def learn(loss, optimizer):
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Textbook(Contender):
    """DMD2 without its GAN; ``anew`` makes new samples for each update of the fake score, as its code does."""

    def __init__(self, pipeline, batch, lora, steps=4, fake_updates=2, anew=False):
        super().__init__(pipeline, batch, lora)
        self.steps, self.fake_updates, self.anew = steps, fake_updates, anew
        (self.student, self.optimizer), (self.fake, self.fake_optimizer) = self.copy_to_train(), self.copy_to_train()
        self.networks = [self.teacher, self.student, self.fake]
        self.times = torch.arange(steps, 0, -1) * 1000 // steps - 1

    @torch.no_grad()
    def simulate(self, prompts, steps):
        """The states and predictions of the student's first steps, each (steps, N, C, H, W)."""
        x, states, predictions = torch.randn(self.shape), [], []
        for step in range(steps):
            states.append(x)
            predictions.append(self.predict(self.student, x, self.times[step].expand(self.batch), prompts)[1])
            if step + 1 < self.steps:
                x, _ = self.renoised(predictions[-1], self.times[step + 1].expand(self.batch))
        return [*states, x], predictions

    def update(self):
        prompts = self.prompts()
        states, predictions = ([], []) if self.anew else self.simulate(prompts, self.steps)
        for _ in range(self.fake_updates):
            if self.anew:
                prompts = self.prompts()
                _, predictions = self.simulate(prompts, int(torch.randint(self.steps, ())) + 1)
            x_0 = predictions[-1] if self.anew else predictions[int(torch.randint(self.steps, ()))]
            t = torch.randint(1000, (self.batch,))
            x_t, noise = self.renoised(x_0, t)
            alpha, sigma = self.levels(t)
            v, _ = self.predict(self.fake, x_t, t, prompts)
            learn(mse_loss(v, alpha * noise - sigma * x_0), self.fake_optimizer)
        step = int(torch.randint(self.steps, ()))
        if self.anew:
            states, _ = self.simulate(prompts, step)
        _, x_0 = self.predict(self.student, states[step], self.times[step].expand(self.batch), prompts)
        with torch.no_grad():
            t = torch.randint(20, 980, (self.batch,))
            x_t, _ = self.renoised(x_0, t)
            real, fake = (self.predict(network, x_t, t, prompts)[1] for network in (self.teacher, self.fake))
            wish = x_0 - (fake - real) / (x_0 - real).abs().mean((1, 2, 3), keepdim=True)
        learn(0.5 * mse_loss(x_0, wish), self.optimizer)


class ConsistencyScript(Contender):
    """A teacher's guided prediction, the student at the earlier state, and the target at the later one."""

    def __init__(self, pipeline, batch, lora):
        super().__init__(pipeline, batch, lora)
        self.student, self.optimizer = self.copy_to_train()
        self.target = self.student if lora else deepcopy(self.student).requires_grad_(False)  # As the two scripts do.
        self.networks = [self.teacher, *dict.fromkeys([self.student, self.target])]
        self.empty = self.embeddings[-1:].expand(batch, -1, -1)

    def update(self):
        prompts, t = self.prompts(), torch.randint(20, 1000, (self.batch,))
        x_t, _ = self.renoised(torch.randn(self.shape), t)
        _, x_0 = self.predict(self.student, x_t, t, prompts)
        with torch.no_grad():
            both = torch.cat([self.empty, prompts])
            plain, told = self.predict(self.teacher, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)[1].chunk(2)
            earlier, _ = self.renoised(plain + 3.0 * (told - plain), t - 20)
            _, goal = self.predict(self.target, earlier, t - 20, prompts)
        learn(mse_loss(x_0, goal), self.optimizer)
        if self.target is not self.student:
            with torch.no_grad():
                for average, weight in zip(self.target.parameters(), self.student.parameters(), strict=True):
                    average.lerp_(weight, 0.05)


class Transformerlike(nn.Module):
    """The U-Net under the names of arguments that modelopt uses."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return self.network(hidden_states, timestep, encoder_hidden_states, return_dict=False)


class Modelopt(Contender):
    """The loop of modelopt.torch.fastgen's documentation, until the student has been updated once."""

    def __init__(self, pipeline, batch, lora, steps=4, fake_updates=2):
        super().__init__(pipeline, batch, lora)
        import modelopt.torch.fastgen as mtf

        self.fake_updates = fake_updates
        (self.student, self.optimizer), (self.fake, self.fake_optimizer) = self.copy_to_train(), self.copy_to_train()
        self.networks = [self.student, self.teacher, self.fake]
        several = {"sample_t_cfg": {"t_list": [*(0.999 * k / steps for k in range(steps, 0, -1)), 0.0]}}
        several |= {"student_sample_steps": steps, "student_sample_type": "sde", "backward_simulation": True}
        config = mtf.DMDConfig(num_train_timesteps=1000, **(several if steps > 1 else {}))
        self.losses = mtf.DMDPipeline(*map(Transformerlike, self.networks), config)

    def update(self):
        for _ in range(self.fake_updates):
            made = self.losses.compute_fake_score_loss(torch.zeros(self.shape), torch.randn(self.shape), self.prompts())
            learn(made["total"], self.fake_optimizer)
        made = self.losses.compute_student_loss(torch.zeros(self.shape), torch.randn(self.shape), self.prompts())
        learn(made["total"], self.optimizer)
