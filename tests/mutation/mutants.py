"""The mutants: what was wrong, where it was seen, the same mistake in our code, and the test that it cannot pass."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One replacement in one function's source."""

    function: str
    """module:qualified name."""
    old: str
    """Occurs once."""
    new: str


@dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str
    seen_in: str
    edits: tuple[Edit, ...]
    killed_by: str
    """A fast test of the ordinary suite, as pytest writes it."""


def mutant(name: str, seen_in: str, function: str, old: str, new: str, killed_by: str, *more: Edit) -> Mutant:
    """A mutant of one edit, or of more."""
    first = Edit(function=f"ilvr_lightning.{function}", old=old, new=new)
    return Mutant(name=name, seen_in=seen_in, edits=(first, *more), killed_by=f"tests/{killed_by}")


WEIGHTS_ALONE = """ckpt_path=run.resume_from and model.load_state_dict(
    __import__("torch").load(run.resume_from, weights_only=True)["state_dict"]) and None"""

MUTANTS = (
    mutant(
        "reference one level too high", "ilvr_adm (the paper's released code)",
        "diffusion.conditioning:ILVRRun.refine_sample",
        'self._from if self.settings.reference_noise == "fresh_released" else t', "self._from",
        "diffusion/test_samplers.py::test_released_reference_is_noised_at_the_level_it_comes_from",
    ),
    mutant(
        "last step never refined", "ilvr_adm (index > range_t)",
        "diffusion.conditioning:ILVRRun.refine_sample",
        "inside = self._is_conditioned(t)", "inside = self._is_conditioned(t) if t else [False]",
        "diffusion/test_conditioning.py::test_last_step_is_algorithm_1s_line_9",
    ),
    mutant(
        "range tested at the level that a step leaves", "ilvr_adm and its forks",
        "diffusion.conditioning:ILVRRun.refine_sample",
        "inside = self._is_conditioned(t)", "inside = self._is_conditioned(self._from)",
        "diffusion/test_conditioning.py::test_range_is_in_training_timesteps_and_holds_both_ends",
    ),
    mutant(
        "gain inverted", "the gain is largest where the signal says least",
        "diffusion.multiplier:Multiplier.__call__",
        "(1 / (snr * total)).clamp(max=self._gain)", "(snr * total).clamp(max=self._gain)",
        "diffusion/test_multiplier.py::test_equations",
    ),
    mutant(
        "decay of the multiplier forgotten", "the method of multipliers at one level alone has none",
        "diffusion.multiplier:Multiplier.__call__",
        "e = e * torch.exp(-h * rho)", "pass",
        "diffusion/test_multiplier.py::test_equations",
    ),
    mutant(
        "what a noisy reference already has is added again", "fitting the reference's noise (DPS, table 1)",
        "diffusion.conditioning:ILVRRun._noised_reference",
        "(1 - self._variance / variance).clamp(min=0)", "(1 + 0 * self._variance)",
        "diffusion/test_reference_sigma.py::test_only_the_missing_noise_is_added",
    ),
    mutant(
        "the candidate of the least evidence is kept", "a loss taken for a log-likelihood",
        "diffusion.evidence:step_evidence",
        "return -0.5", "return 0.5",
        "diffusion/test_candidates.py::test_candidates_find_the_mode_that_one_run_misses",
    ),
    mutant(
        "the high band is corrected by the prior covariance", "regression that does not know the noise level",
        "diffusion.components:HighBandCorrection.__call__",
        "1 / (1 / C.variances + snr)", "C.variances",
        "diffusion/test_components.py::test_correction_is_the_regression_on_the_low_band[0.0-2]",
    ),
    mutant(
        "variances not squared", "deviations taken for variances",
        "diffusion.low_band:LowBand.variances",
        "(dct_basis(side) @ Q).square()", "(dct_basis(side) @ Q).abs()",
        "diffusion/test_low_band.py::test_radial_spectrum_of_images_whose_spectrum_is_radial",
    ),
    mutant(
        "clipping after refining", "forks of ilvr_adm",
        "diffusion.conditioning:ILVRRun.refine_sample",
        "x + self._low_band(y - x, t)", "(x + self._low_band(y - x, t)).clamp(-1, 1)",
        "diffusion/test_conditioning.py::test_reference_is_noised_at_the_level_that_the_step_goes_to",
    ),
    mutant(
        "mask applied in pixels", "masks multiplied onto the low-passed difference (most inpainting scripts)",
        "diffusion.conditioning:ILVRRun._low_band",
        "return self.settings.low_pass.weighted(difference, self._active_cells(self._mask, t))",
        "return self.settings.low_pass(difference) * self.settings.mask",
        "diffusion/test_masks.py::test_edges_leave_no_seam",
    ),
    mutant(
        "antialias switched off", "resizing with interpolate(mode='bicubic') and its default",
        "diffusion.low_pass:resize_matrix",
        "stretch = min(scale, 1.0)", "stretch = 1.0",
        "diffusion/test_low_pass.py::test_matches_the_reference_implementation",
    ),
    mutant(
        "phi in bfloat16", "the whole sampling loop under autocast",
        "diffusion.low_pass:LowPassFilter.__call__",
        "return rows @ x @ columns", "return (rows.bfloat16() @ x.bfloat16() @ columns.bfloat16()).to(x.dtype)",
        "diffusion/test_low_pass.py::test_matches_the_reference_implementation",
    ),
    mutant(
        "strided steps with the next timestep's alphas_cumprod", "lucidrains/denoising-diffusion-pytorch issue 81",
        "diffusion.samplers:Run.steps",
        "float(self.schedule.alphas_cumprod[s])", "float(self.schedule.alphas_cumprod[t - 1])",
        "diffusion/test_diffusers_samplers.py::test_ddpm",
    ),
    mutant(
        "steps of T // n whatever comes next", "huggingface/diffusers issues 11347 and 12633 (DDIM, linspace)",
        "diffusion.samplers:Run.steps",
        "pairwise([*self.timesteps, 0])",
        "[(t, max(t - self.schedule.num_timesteps // len(self.timesteps), 0)) for t in self.timesteps]",
        "diffusion/test_samplers.py::test_ddim_of_white_noise_is_a_product_of_cosines",
    ),
    mutant(
        "timesteps off by one", "ports between 0-based and 1-based code",
        "diffusion.denoiser:Denoiser.raw",
        "t - 1", "t",
        "diffusion/test_denoiser.py::test_network_is_asked_with_a_zero_based_index",
    ),
    mutant(
        "learned variance's interpolation swapped", "ports of Nichol and Dhariwal 2021, equation 15",
        "diffusion.samplers:_deviation",
        "v * math.log(large) + (1 - v) * math.log(small)", "v * math.log(small) + (1 - v) * math.log(large)",
        "diffusion/test_samplers.py::test_variance_of_a_step",
    ),
    mutant(
        "log-variance taken for log-deviation", "ports of improved-diffusion",
        "diffusion.samplers:_deviation",
        "torch.exp(0.5 * (", "torch.exp(1.0 * (",
        "diffusion/test_samplers.py::test_variance_of_a_step",
    ),
    mutant(
        "a missing factor 2", "deepinv/deepinv pull request 1343 (VP)",
        "diffusion.samplers:dpmpp_2m",
        "h / (2 * h_before)", "h / h_before",
        "diffusion/test_diffusers_samplers.py::test_dpm_solver",
    ),
    mutant(
        "sigma left out of DDIM's direction", "implementations of Song et al. 2021, equation 12, tested at eta=0 alone",
        "diffusion.samplers:ddim",
        "math.sqrt(max(0.0, 1 - a_s - sigma**2))", "math.sqrt(1 - a_s)",
        "diffusion/test_samplers.py::test_eta_scales_the_noise_and_keeps_the_level",
    ),
    mutant(
        "eps kept when x_0 is clipped", "huggingface/diffusers DDIM (use_clipped_model_output=False)",
        "diffusion.denoiser:clip_prediction",
        "eps=(x - signal * x0) / sigma", "eps=prediction.eps",
        "diffusion/test_denoiser.py::test_clipping_computes_eps_again",
    ),
    mutant(
        "a seed of 0 ignored", "huggingface/diffusers pull request 10964 (if args.seed)",
        "diffusion.noise:PerImageNoise.__init__",
        "self.seeds = list(seeds)", "self.seeds = [seed or int(torch.randint(2**31, ())) for seed in seeds]",
        "diffusion/test_noise.py::test_every_seed_makes_its_picture_again",
    ),
    mutant(
        "one generator for the whole batch", "most sampling scripts: a picture depends on what shares its batch",
        "diffusion.noise:PerImageNoise.draw",
        "derive_seed(seed, stream)", "derive_seed(self.seeds[0], stream)",
        "diffusion/test_noise.py::test_pictures_do_not_depend_on_batch_size_or_order",
    ),
    mutant(
        "gradient of the bound reaches the mean", "ports of Nichol and Dhariwal 2021 without the stop-gradient",
        "diffusion.loss:training_losses",
        "mean.detach()", "mean",
        "diffusion/test_loss.py::test_gradient_of_the_bound_reaches_the_variance_alone",
    ),
    mutant(
        "log of a posterior variance of 0 at t=1", "early PyTorch ports of Ho et al. 2020",
        "diffusion.schedule:NoiseSchedule.__init__",
        "variance[0] = variance[1] if len(betas) > 1 else betas[0]", "pass",
        "diffusion/test_denoiser.py::test_bounds_of_a_single_timestep_are_finite",
    ),
    mutant(
        "cosine schedule without its offset", "ports of Nichol and Dhariwal 2021, equation 17",
        "diffusion.schedule:NoiseSchedule.cosine",
        "(u + 0.008) / 1.008", "u",
        "diffusion/test_diffusers_samplers.py::test_schedules",
    ),
    mutant(
        "queries, keys and values cut in the other order", "conversions between ADM's two attention orders",
        "models.blocks:Attention.forward",
        "if self.new_order:", "if not self.new_order:",
        "models/test_unet.py::test_matches_the_reference_implementation",
    ),
    mutant(
        "sines and cosines exchanged", "conversions of Ho et al.'s checkpoints",
        "models.blocks:timestep_embedding",
        "if flip_sin_to_cos else", "if True else",
        "checkpoints/test_ddim.py::test_ddim_layout_is_ho_et_als_network",
    ),
    mutant(
        "padding on both sides when downsampling", "conversions of Ho et al.'s checkpoints",
        "models.blocks:Downsample.forward",
        "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 1, 1, 1))",
        "checkpoints/test_diffusers.py::test_diffusers_folder",
    ),
    mutant(
        "the schedule's buffers averaged with the weights", "lucidrains/denoising-diffusion-pytorch issue 136",
        "training.ema:EMA.__init__",
        "use_buffers=False", "use_buffers=True",
        "training/test_ema.py::test_checkpoint_holds_average_and_raw_weights",
        Edit(
            function="ilvr_lightning.training.module:DDPM.__init__",
            old="self._loss_sums = torch.zeros(5, 2)",
            new='self._loss_sums = torch.zeros(5, 2); self.register_buffer("alphas_cumprod", '
            "self.schedule.alphas_cumprod.float())",
        ),
    ),
    Mutant(
        name="resumed with the weights alone",
        seen_in="openai/guided-diffusion issues 23 and 68 (several GPUs: optimizer and average stay behind)",
        edits=(Edit(function="train:train", old="ckpt_path=run.resume_from", new=WEIGHTS_ALONE),),
        killed_by="tests/training/test_resume.py::test_resume_after_an_epoch",
    ),
    mutant(
        "no warm-up of the average", "decay 0.9999 from the first step on, in which the initial weights stay for long",
        "training.ema:EMA._average",
        "min(self.decay, (1 + n) / (10 + n))", "self.decay",
        "training/test_ema.py::test_ema_by_hand",
    ),
    mutant(
        "accumulated micro-batches share their noise", "seeds from the step and the rank alone",
        "training.module:DDPM.training_step",
        "batch_idx % micro_batches * self.trainer.world_size + self.trainer.global_rank", "self.trainer.global_rank",
        "training/test_module.py::test_accumulation_gives_the_same_losses",
    ),
    mutant(
        "a warm-up that begins at 0", "LambdaLR(step / warmup): the first step teaches nothing",
        "training.module:lr_factor",
        "(step + 1) / (optim.warmup_steps + 1)", "step / max(1, optim.warmup_steps)",
        "training/test_module.py::test_learning_rate",
    ),
    mutant(
        "a resumed epoch begins at its first batch", "samplers that do not know the step (Lightning before 2.5)",
        "data.datamodule:TrainBatchSampler.__iter__",
        "first = self.position()", "first = self.position() // self.steps * self.steps",
        "data/test_datamodule.py::test_a_resumed_run_continues_in_mid_epoch",
    ),
    mutant(
        "the same order in every epoch", "DistributedSampler without set_epoch",
        "data.order:ShuffledOrder._permute",
        'derive_seed(self.seed, "order", pass_number)', 'derive_seed(self.seed, "order")',
        "data/test_order.py::test_passes_are_permutations",
    ),
    mutant(
        "ranks see the same images", "loaders that no sampler divides (IterableDataset under DDP)",
        "data.order:rank_share",
        "range(rank, micro_batches, world_size)", "range(0, micro_batches, world_size)",
        "data/test_order.py::test_ranks_share_a_batch",
    ),
    mutant(
        "images that fill up a share are validated twice", "DistributedSampler, which repeats the first images",
        "data.datamodule:ValidationSampler.__init__",
        "i if i < length else -(i % length) - 1", "i % length",
        "data/test_datamodule.py::test_validation_covers_all_images_once",
    ),
    mutant(
        "photographs on their side", "torchvision.datasets.ImageFolder, which ignores the EXIF orientation",
        "data.images:_load",
        "_turn_upright(image)", "pass",
        "data/test_images.py::test_exif_rotation_is_applied",
    ),
    mutant(
        "16 bits clipped to 8", "Image.convert('RGB') of a 16-bit PNG",
        "data.images:convert",
        'image.mode[0] in "IF"', "False",
        "data/test_images.py::test_greyscale_of_16_bits_is_scaled_not_clipped",
    ),
    mutant(
        "images stretched to a square", "transforms.Resize((size, size))",
        "data.images:fit_image",
        "return ImageOps.fit(image, width_height, resampling)", "return image.resize(width_height, resampling)",
        "data/test_images.py::test_crop_takes_the_centre",
    ),
    mutant(
        "rounded down to 8 bits", "openai/guided-diffusion and ilvr_adm: ((x + 1) * 127.5).to(torch.uint8)",
        "data.images:from_tensor",
        ".round()", "",
        "data/test_images.py::test_all_256_values_come_back",
    ),
    mutant(
        "the file overrides the command line", "argparse.set_defaults after parse_args",
        "config.load:load_config",
        "layers += [_read_override(argument)", "layers[:0] = [_read_override(argument)",
        "config/test_config.py::test_overrides_come_after_the_file",
    ),
    mutant(
        "an old file takes the defaults of today", "checkpoints that store only what differs from a default",
        "config.load:config_from_dict",
        "OmegaConf.create(DEFAULTS_OF_OLD_CHECKPOINTS)", "OmegaConf.create({})",
        "config/test_config.py::test_what_an_old_checkpoint_lacks_means_what_it_meant_then",
    ),
    mutant(
        "files written in place", "a killed writer leaves half a file under the final name",
        "atomic:write_atomically",
        'path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")', "path",
        "test_atomic.py::test_a_writer_that_fails_leaves_the_old_file",
    ),
    mutant(
        "a name ends the script element", "pages that paste json.dumps into <script>",
        "visual.pages:write_page",
        '.replace("<", r"\\u003c")', "",
        "sampling/test_gallery.py::test_no_text_ends_the_script",
    ),
    mutant(
        "an image under another mask taken for this one", "caches whose key lacks an input",
        "sampling.requests:SampleRequests.matches",
        "(*hashes.values(), sigma) == (*wanted, noise)", "(hashes['reference_sha256'], sigma) == (wanted[0], noise)",
        "sampling/test_requests.py::test_an_image_matches_its_own_recipe_alone",
    ),
)  # fmt: skip
