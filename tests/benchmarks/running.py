"""Runs one recipe in the process that loaded its model, and returns its figures."""

import contextlib
import gc
import random
import statistics
import sys
import time

from .recipes import RECIPES, Answering, Scoring, Training, examples, loaded_model, settings_for

WARM_UP = 2  # steps that are not timed: the first one compiles, the second meets new shapes


def trl_trainer(options, recipe, rows):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from . import t4_shape

    settings = settings_for(options, recipe)
    with t4_shape.whole_card():  # in 4 bits already, as the model's own configuration says
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float16, attn_implementation="sdpa", device_map={"": 0}
        )
        # In here too: it gives weights back to the whole card's stream, which may unmap them while the shape still reads.
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(settings.output_dir), max_length=2048, per_device_train_batch_size=recipe.size,
            gradient_accumulation_steps=recipe.accumulation, learning_rate=2e-4, max_steps=settings.max_steps,
            warmup_steps=1, optim="adamw_8bit", weight_decay=0.01, logging_steps=1, save_strategy="no", seed=3407,
            data_seed=3407, fp16=True, bf16=False, gradient_checkpointing=True, report_to="none", disable_tqdm=True,
            completion_only_loss=True,
        ),
    )  # fmt: skip
    for weight in trainer.model.parameters():  # TRL casts adapters to bf16, for which the fp16 scaler has no kernel
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def unsloth_trainer(options, recipe, rows):
    from medcot import kernels, make_trainer
    from medcot.model import exempt_from_recomputation

    model, tokenizer = loaded_model(options)
    dispatch = sys.modules["unsloth.utils.attention_dispatch"]
    dispatch.HAS_XFORMERS = recipe.xformers and dispatch.xformers is not None
    kernels._takes_flash = lambda device: not recipe.one_call  # what takes flash attention is left as Unsloth comes
    trainer = make_trainer(model, tokenizer, rows, settings_for(options, recipe))
    trainer.data_collator.pad_to_multiple_of = recipe.multiple  # make_trainer sets 8 where nothing is padded
    if recipe.sent_by_trl:
        from trl.models.activation_offloading import get_act_offloading_ctx_manager

        exempt_from_recomputation(model, range(model.config.num_hidden_layers))
        trainer.maybe_activation_offload_context = get_act_offloading_ctx_manager(model, min_offload_size=2**20)
    return trainer


def timed(trainer, rows, deadline):
    """Trains; returns seconds, tokens and losses of the steps, a step timed to its end on the GPU. No step begins that
    would end after `deadline`."""
    import torch
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            if time.monotonic() + seconds[-1] > deadline:
                control.should_training_stop = True

    # Only the clock: what medcot's own callback writes and draws in a step is not the recipe's.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("RunCallback", "PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(Clock())
    # The order the sampler draws the rows in, to count each step's real tokens, over all processes.
    batches = [sum(len(rows[i]["input_ids"]) for i in batch) for batch in trainer.get_train_dataloader().batch_sampler]
    trainer.train()
    micro = trainer.args.gradient_accumulation_steps
    tokens = [sum(batches[micro * step : micro * step + micro]) for step in range(len(seconds))]
    if trainer.args.world_size > 1:
        counts = torch.tensor(tokens, device="cuda")
        torch.distributed.all_reduce(counts)
        tokens = counts.tolist()
    return seconds, tokens, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def training(options, recipe, deadline):
    import torch

    from medcot import activations

    rows = examples(500, 1000)
    try:
        trainer = (trl_trainer if recipe.stack == "trl" else unsloth_trainer)(options, recipe, rows)
        seconds, tokens, losses = timed(trainer, rows, deadline)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error)[:120]}"}
    rates = [count / took for count, took in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)]
    found = {"tokens_per_second": statistics.median(rates) if rates else None, "losses": losses, "seconds": seconds}
    found |= {"tokens": tokens, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    if recipe.host_gib:
        sender = activations._SENDERS[trainer.model.get_decoder().layers]
        found["host_gib"] = len(sender.chunks) * activations.CHUNK / 2**30  # at the widest micro-batch so far
        activations.release_host_memory(trainer.model)
    return found


def answering(options, recipe, deadline):
    """Milliseconds a decoding step and a prompt token, from answers of two lengths after one to warm up."""
    import torch
    import torch.nn.functional
    from transformers import GenerationConfig

    from medcot import model as rooms
    from medcot.kernels import decoding_attention

    model, tokenizer = loaded_model(options)
    import unsloth.kernels.utils
    import unsloth.models.llama

    unsloth.kernels.utils._BNB_GEMM_4BIT_MAX_ROWS = recipe.fused_rows
    unsloth.kernels.utils._TRITON_GEMV_EAGER = recipe.triton
    rooms.free_decoding_memory(model)
    rooms.for_inference(model)
    attention = decoding_attention if recipe.grouped else torch.nn.functional.scaled_dot_product_attention
    unsloth.models.llama.scaled_dot_product_attention = attention
    prompts = torch.tensor([ids[: recipe.tokens] for ids in _questions(recipe.rows, recipe.tokens)], device="cuda")

    def seconds(new):
        config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=tokenizer.pad_token_id
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode(), model.disable_adapter():
            output = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config
            )
        torch.cuda.synchronize()
        return time.perf_counter() - started, output[:, recipe.tokens :].tolist()

    try:
        seconds(4)
        (short, _), (long, written) = seconds(4), seconds(20)
    except torch.OutOfMemoryError as error:
        rooms.free_decoding_memory(model)
        return {"error": f"out of memory: {str(error)[:120]}"}
    step = (long - short) / 16
    found = {"step_ms": 1000 * step, "tokens_per_second": recipe.rows / step, "prompts_seconds": short - 4 * step}
    found["written"] = [tokens[:12] for tokens in written]
    rooms.free_decoding_memory(model)
    return found


def _questions(rows, tokens):
    chance = random.Random(5)
    return [[0, *(chance.randrange(10, 600) for _ in range(tokens - 1))] for _ in range(rows)]


def scoring(options, recipe, deadline):
    """Tokens a second in batches as medcot makes them: questions with four options, or a prompt and a reference."""
    import torch

    from medcot import model as rooms
    from medcot.evaluation import likelihood

    model, tokenizer = loaded_model(options)
    rooms.for_inference(model)
    chance = random.Random(6)

    def text(length):
        return [chance.randrange(10, 600) for _ in range(length)]

    if recipe.options:
        items = [([0, *text(279)], [text(6) for _ in range(4)]) for _ in range(27)]
    else:
        items = [([0, *text(99)], [text(650)]) for _ in range(10)]
    took = []
    with model.disable_adapter():
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            likelihood._score_batch(model, tokenizer, items)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - started)
    tokens = sum(len(prompt) + sum(map(len, continuations)) for prompt, continuations in items)
    return {"tokens_per_second": tokens / min(took[1:]), "tokens": tokens}


def measure(options, name, deadline):
    """One recipe's figures, with the peak of GPU memory."""
    import torch

    recipe = RECIPES[name]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = {Training: training, Answering: answering, Scoring: scoring}[type(recipe)]
    with contextlib.redirect_stdout(sys.stderr):
        found = run(options, recipe, deadline)
    return found | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
