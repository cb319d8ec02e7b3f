"""Every setting of a run, as frozen dataclasses, one per Hydra group.

The string under a field is its documentation: the unit first where there is one. ``--help`` and docs read it.
A name that Python keeps for itself has a `_` behind it, here alone: users write checkpoint.async.
Nothing here touches a disk, a process or torch: a login node reads this module.
`bigtrain.config.check` says what is wrong with a config; this module only gives names, types and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _choice(default: str, *choices: str) -> Any:
    """A string field that admits only `choices`; `bigtrain.config.check` enforces it."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """What the run is called and where it is kept."""

    name: str = "default"
    """Name of the run; also the name of its folder and of its W&B run."""
    dir: str = "runs/${run.name}"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, report.html, logs/, wandb/."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    name: str = "tiny"
    """Name of the preset."""
    num_layers: int = 6
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 8
    """Query heads; they divide hidden_size."""
    num_query_groups: int = 4
    """Key/value heads (GQA); equal to num_attention_heads for plain multi-head attention."""
    ffn_hidden_size: int = 704
    """Width inside the feed-forward block."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    tie_embeddings: bool = False
    """Share the input embedding with the output layer."""
    position: str = _choice("rope", "rope", "learned")
    """Rotary or learned position embedding."""
    max_positions: int = 2048
    """Tokens; rows of the learned position table, and the longest sequence that the model is meant for."""
    rope_theta: float = 10000.0
    """Base of the rotary angles."""
    norm: str = _choice("rmsnorm", "rmsnorm", "layernorm")
    """Before each block and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: str = _choice("swiglu", "swiglu", "gelu")
    """gelu is the tanh approximation, as in GPT-2."""
    bias: bool = False
    """Biases in the linear layers (GPT-2 has them, Llama has not)."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    hidden_dropout: float = 0.0
    """Dropout after the embedding, the attention block and the feed-forward block."""
    init_std: float = 0.02
    """Standard deviation of initial weights; the two residual output layers divide it by sqrt(2 num_layers)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are laid out over the ranks. The data-parallel size is what is left:
    world / (tensor x pipeline)."""

    tensor: int = 1
    """Ranks that share each layer's weights (Megatron tensor parallelism)."""
    pipeline: int = 1
    """Stages that the layers are spread over."""
    virtual_pipeline: int = 1
    """Model chunks a stage (interleaved 1F1B)."""
    sequence: bool = False
    """Shard activations outside the tensor-parallel regions over the sequence (Megatron sequence parallelism)."""
    zero_stage: int = 3
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters sharded over data ranks."""
    gather: str = _choice("auto", "auto", "microbatch", "step")
    """ZeRO-3: gather parameters for each microbatch (least memory) or keep them for the step (least traffic). auto:
    for the step, where they take no more than a quarter of the memory that the training state leaves free."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    dtype: str = _choice("fp32", "fp32", "bf16", "fp16")
    """Of weights in forward and backward. Master weights, gradient reduction and Adam moments are always fp32."""
    initial_loss_scale: float = 65536.0
    """fp16: what the loss is multiplied with at first. It is halved when a gradient overflows; that step is skipped."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow after which the loss scale doubles."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of the training."""

    num_steps: int = 300
    """Optimizer steps; ignored where num_tokens is set."""
    num_tokens: int | None = None
    """Tokens; the number of steps is this over the tokens in a global batch, rounded up."""
    stop_after: int | None = None
    """Save and stop after this many steps of the run; the schedule still spans num_steps, and the same command without
    this goes on from there."""
    global_batch_size: int = 16
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences a forward pass on one rank."""
    sequence_length: int = 256
    """Tokens a sequence."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    recompute: str = _choice("none", "none", "selective", "full")
    """Activation recompute: attention only, or whole layers."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), or plain SGD."""

    name: str = _choice("adamw", "adamw", "sgd")
    """sgd: no momentum; to compare runs, since it carries rounding on as it is. The betas and eps are AdamW's."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """On matrices only: norms and biases are not decayed."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps, as a share of optim.lr."""

    name: str = _choice("cosine", "cosine", "linear", "wsd", "constant")
    """wsd: warm up, stay, decay in the last decay_fraction (https://arxiv.org/abs/2404.06395)."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    min_ratio: float = 0.1
    """Learning rate at the end, as a share of optim.lr."""
    decay_fraction: float = 0.2
    """wsd: share of all steps that the final linear decay takes."""


@dataclass(frozen=True)
class WeightConfig:
    """A weight from some point of the run on."""

    from_tokens: int = 0
    """Tokens trained on by then."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources."""


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards."""

    path: str = ""
    """Folder that tools/shards.py built, http(s)://HOST/FOLDER, s3://BUCKET/FOLDER, or a command that prints a file of
    it: pipe:COMMAND, with {file} where the name goes. To train on raw text, WebDataset tars of .txt or .json: a folder
    of them, or their names with {000..127}: s3://BUCKET/FOLDER/web-{000..127}.tar."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources; 0: none until `then`. Not used for held-out data."""
    then: list[WeightConfig] = field(default_factory=list[WeightConfig])
    """Weights from later on: [{from_tokens: 2_000_000_000, weight: 0.5}]. Not used for held-out data."""
    field: str = "text"
    """Of raw text: key of the text in .json members of the tars."""
    prompt_field: str = ""
    """Of raw text: key of a prompt in them, which stands before the text and is not learned; empty: none."""
    set: str = ""
    """Held-out data: the evaluation set that this belongs to; empty for the only one. Letters, digits, _ and -."""


@dataclass(frozen=True)
class PrepareConfig:
    """Text that `bigtrain.launch` turns into a tokenizer and shards first, where they are not there yet."""

    inputs: list[str] = field(default_factory=list[str])
    """Files, folders, globs or URLs of text, JSON lines and parquet (tools/shards.py --help tells the kinds by their
    names); empty: nothing is prepared, data.train must be there."""
    exclude: list[str] = field(default_factory=list[str])
    """Patterns of paths that are left out; * matches / too, and a relative pattern matches at any depth."""
    json_field: str = "text"
    """Key in JSON lines, or column in parquet, that holds the text."""
    prompt_field: str = ""
    """Key in JSON lines that holds a prompt, which stands before the text and is not learned; empty: none. For pairs to
    fine-tune on: data.prepare.prompt_field=prompt data.prepare.json_field=completion."""
    out: str = ""
    """Folder that gets train/ and valid/."""
    held_out: float = 0.05
    """Share of the documents, chosen by hash, that goes to valid/ and never to train/."""


@dataclass(frozen=True)
class CacheConfig:
    """Where files of remote shards are kept on each machine. Ranks and jobs may share it."""

    dir: str = ""
    """Folder on a disk of the machine; empty: bigtrain/ in $XDG_CACHE_HOME or ~/.cache."""
    max_gb: float = 100.0
    """GB (10^9 bytes); beyond it, what was used least recently is removed."""


@dataclass(frozen=True)
class RemoteConfig:
    """How remote shards are fetched."""

    timeout_s: float = 30.0
    """Seconds to connect, and without hardly a byte coming, before a transfer is tried again."""
    retries: int = 8
    """Failures of a file in a row, without getting further, before the run stops; the pauses grow from 1 s to 30 s."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train: list[SourceConfig] = field(default_factory=list[SourceConfig])
    """Shards to train on: a list of {path, weight}, and `then` where a weight is to change."""
    valid: list[SourceConfig] = field(default_factory=list[SourceConfig])
    """Held-out shards to evaluate on: a list of {path}. For several sets, each with a loss of its own, {path, set}, or
    on the command line 'data.valid={NAME: PATH, NAME: PATH}'."""
    num_lanes: int = 64
    """Independent sequences of documents that the data is dealt into; a multiple of every data-parallel size to come.
    Part of what fixes the order of the data: it does not change within a run."""
    num_workers: int = 1
    """Threads that read ahead; 0 reads in the step. The order does not depend on it."""
    pack: str = _choice("concat", "concat", "best_fit")
    """concat: documents end to end, cut at the sequence length. best_fit: whole documents together as they fit, only
    longer ones cut; less than 1 % of the places stay empty. Attention is kept within each document either way."""
    max_bad_fraction: float = 0.0
    """Share of a source's bytes that may be bad (damaged, not UTF-8, empty): those documents are skipped and counted by
    reason. 0: the run stops at the first, and names it."""
    ledger: bool = True
    """Write down what each data rank was fed in each step (RUN/ledger, 0.1 kB a step): `tools/batches.py audit` proves
    from it that nothing was repeated or left out."""
    on_change: str = _choice("refuse", "refuse", "accept")
    """When a run goes on with other sources or weights than its checkpoint's. accept: the new mixture from there on,
    and nothing of what was consumed is repeated."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to tokens and back."""

    path: str = ""
    """A sentencepiece model, a Hugging Face tokenizer.json, a tiktoken file, or a folder with one of them in it; also a
    file in a remote folder: s3://BUCKET/FOLDER/tokenizer.model."""
    kind: str = _choice("bpe", "bpe", "unigram", "file")
    """Algorithm, where data.prepare trains the tokenizer. file: it trains none, and uses the one at path as it is."""
    vocab_size: int = 4096
    """Pieces, where data.prepare trains the tokenizer. 0, with kind=file: as many as it has."""
    specials: list[str] = field(default_factory=list[str])
    """Names of special tokens that it gets besides <unk>, <s>, </s> and <pad>, where data.prepare trains it."""
    name: str = "tokenizer"
    """What data.prepare.out is named after, in the presets of data."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and where it starts from."""

    interval: int | str = field(default=100, metadata={"words": ("auto",)})
    """Steps between checkpoints; the last step is always saved. 0: only the last. auto: as often as loses the least
    time, from what a save costs, measured in the run, and from how often the job fails (cluster.mtbf_h)."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted once a newer one is durable."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good, and with interval=auto made as well. 0: none."""
    keep_best: int = 0
    """Checkpoints with the lowest held-out loss that are kept, of those that were evaluated at their step. 0: none."""
    async_: bool = True
    """Training waits only for a copy of its state in host memory, which this takes; writing goes on behind it. false:
    training waits until the checkpoint is durable."""
    resume: str = "auto"
    """Where a run without checkpoints of its own starts: auto and never afresh, or a checkpoint's path. A run that has
    some goes on from its newest; never then refuses to start."""
    init_from: str = ""
    """Where the first weights come from: a checkpoint of any layout, a run's folder (its newest) or a Hugging Face
    folder, of the same model and tokenizer. The run begins at step 0, with its own optimizer and data; one that has
    checkpoints goes on from them. Empty: random weights."""


@dataclass(frozen=True)
class AnomalyConfig:
    """What is done where the numbers go wrong."""

    non_finite: str = _choice("skip", "off", "skip", "rewind", "stop")
    """Where the loss or the gradient norm is NaN or infinite. skip: the step changes nothing, and the run goes on
    behind its data. rewind: back to the newest checkpoint, and on behind the data of this step. stop: save the state
    before the step and end. off: as skip, however often. What only overflows at fp16's loss scale does not count."""
    spike: str = _choice("off", "off", "skip", "rewind", "stop")
    """Where the loss jumps: more than `threshold` deviations above the median of the last `window` losses."""
    window: int = 128
    """Losses that median and deviation are taken of; nothing is a spike before there are so many."""
    threshold: float = 8.0
    """Deviations above the median that make a spike: 1.4826 times the median absolute deviation each, and at least 1 %
    of the median."""
    max_skips: int = 10
    """Steps skipped in a row, the last of which is a reason to rewind. No checkpoint is made among them."""
    max_rewinds: int = 10
    """Rewinds of a run; what would be one more stops it. 0: it never goes back."""


@dataclass(frozen=True)
class EvalConfig:
    """How often the held-out loss is measured."""

    interval: int = 100
    """Steps between evaluations; the last step is always evaluated. 0: only the last."""
    num_batches: int = 16
    """Global batches of each held-out set an evaluation; fewer where the set is smaller. Ignored where num_tokens is
    set."""
    num_tokens: int | None = None
    """Tokens of each held-out set an evaluation, rounded up to whole sequences: runs of different batch sizes are then
    measured on the same text."""


@dataclass(frozen=True)
class TrackerConfig:
    """Experiment tracking."""

    kind: str = _choice("wandb", "wandb", "none")
    """Where metrics go besides metrics.jsonl."""
    mode: str = _choice("offline", "offline", "online", "disabled")
    """offline writes RUN/wandb/; `wandb sync` uploads it later."""
    project: str = "bigtrain"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    log_interval: int = 10
    """Steps between lines on a console that is no terminal; metrics.jsonl and W&B get every step."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run. Without +cluster=..., on this machine."""

    kind: str = _choice("local", "local", "slurm")
    """This machine, or a job of a Slurm cluster."""
    num_nodes: int = 1
    """Machines."""
    procs_per_node: int = 0
    """Ranks a node. 0: as many as there are GPUs, or 4 on a machine without (local only)."""
    device: str = _choice("auto", "auto", "cpu", "cuda")
    """auto: GPUs where there are any."""
    partition: str | None = None
    """Slurm's partition."""
    account: str | None = None
    """Slurm's account."""
    time: str = "1-00:00:00"
    """Slurm's time limit, D-HH:MM:SS."""
    requeue: bool = True
    """Slurm: queue the job again at the time limit, on preemption, on node failure, and after a crash or a hang as
    often as max_restarts says; it goes on where it was."""
    signal_s: int = 90
    """Seconds ahead of the time limit at which Slurm warns the run, which then saves: more than a step and a save
    take."""
    mtbf_h: float = 24.0
    """Hours between failures of the whole job, for checkpoint.interval=auto; once the run has failed three times, its
    own mean counts instead. For orientation: 1,024 GPUs fail about every 8 hours, 16,384 every 2 to 3
    (https://arxiv.org/abs/2410.21680, https://arxiv.org/abs/2407.21783)."""
    cpus_per_proc: int = 8
    """Slurm's cpus-per-task."""
    setup: list[str] = field(default_factory=list[str])
    """Shell lines before the ranks start: modules, environments."""
    sbatch: dict[str, str] = field(default_factory=dict[str, str])
    """Any other sbatch option, by its long name; true for one that takes no value."""
    max_restarts: int = 0
    """How often a run that crashed or hung is started again, from its newest checkpoint. Not after a failure that would
    only come again: a mistake in the settings, before the first step, or twice at the same step. With +cluster=slurm
    it is 3, and they are counted anew when the run was saved at the time limit."""


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hung: then every rank writes where it is (RUN/logs/hang), and all ranks end."""

    startup_s: float = 1800.0
    """Seconds until the first batch is asked for, and for all that comes after the last step. The first batch, step,
    evaluation and save may take as long, too. 0 switches off, here and below."""
    data_s: float = 600.0
    """Seconds that a step's batch may take."""
    step_s: float = 600.0
    """Seconds that a step may take without its data, evaluation and save."""
    eval_s: float = 1800.0
    """Seconds that the evaluation on one set may take."""
    save_s: float = 1800.0
    """Seconds that a save may take, also behind the training."""
    factor: float = 10.0
    """Times the median of the last ones that each may take, where that is longer."""


@dataclass(frozen=True)
class Config:
    """The whole of a run. config.yaml in the run's folder is this, resolved."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    dry_run: bool = False
    """Print the layout and the derived numbers, and start nothing."""
