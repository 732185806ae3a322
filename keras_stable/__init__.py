"""Train transformers at the edge of stability, in Keras 3, on any backend."""

# Variants: methods as values.
from keras_stable.choices import Architecture as Architecture
from keras_stable.choices import Clip as Clip
from keras_stable.choices import Entropy as Entropy
from keras_stable.choices import Learned as Learned
from keras_stable.choices import Placement as Placement
from keras_stable.choices import QKVNorm as QKVNorm
from keras_stable.choices import SigmaReparam as SigmaReparam
from keras_stable.choices import Softmax as Softmax
from keras_stable.choices import check_choice as check_choice
from keras_stable.variants import PAPER as PAPER
from keras_stable.variants import VARIANTS as VARIANTS
from keras_stable.variant import Variant as Variant
from keras_stable.variants import get as get_variant

# Layers.
from keras_stable.norms import NORMS as NORMS
from keras_stable.norms import L2Norm as L2Norm
from keras_stable.norms import LayerNorm as LayerNorm
from keras_stable.norms import RMSNorm as RMSNorm
from keras_stable.linear import SigmaReparamDense as SigmaReparamDense
from keras_stable.positions import PositionEmbedding as PositionEmbedding
from keras_stable.embeddings import TokenEmbedding as TokenEmbedding
from keras_stable.attention import CausalSelfAttention as CausalSelfAttention
from keras_stable.mlp import MLP as MLP
from keras_stable.block import TransformerBlock as TransformerBlock

# Telemetry of any Keras model.
from keras_stable.guard import Guard as Guard
from keras_stable.watch import Watch as Watch
from keras_stable.watch import watch as watch

# Models.
from keras_stable.backbone import PAPER_VOCABULARY as PAPER_VOCABULARY
from keras_stable.backbone import SIZES as SIZES
from keras_stable.backbone import StableBackbone as StableBackbone
from keras_stable.models import StableCausalLM as StableCausalLM
from keras_stable.preprocessing import (
    StableCausalLMPreprocessor as StableCausalLMPreprocessor,
)

# Training.
from keras_stable.losses import NextTokenLoss as NextTokenLoss
from keras_stable.losses import next_token_loss as next_token_loss
from keras_stable.optimizers import AdamW as AdamW
from keras_stable.schedules import SCHEDULES as SCHEDULES
from keras_stable.schedules import WarmupSchedule as WarmupSchedule
from keras_stable.distribution import DISTRIBUTIONS as DISTRIBUTIONS
from keras_stable.distribution import process_count as process_count
from keras_stable.distribution import set_distribution as set_distribution

# Data.
from keras_stable.corpora import load_corpus as load_corpus
from keras_stable.corpora import split as split
from keras_stable.corpora import split_stream as split_stream
from keras_stable.corpora import stream_corpus as stream_corpus
from keras_stable.tokenizers import ByteTokenizer as ByteTokenizer
from keras_stable.tokenizers import CharacterTokenizer as CharacterTokenizer
from keras_stable.tokenizers import (
    SentencePieceTokenizer as SentencePieceTokenizer,
)
from keras_stable.tokenizers import pack as pack
from keras_stable.subwords import BPETokenizer as BPETokenizer
from keras_stable.subwords import load_tokenizer as load_tokenizer
from keras_stable.token_cache import TokenizedCorpus as TokenizedCorpus
from keras_stable.token_cache import cache_directory as cache_directory
from keras_stable.token_cache import tokenize_corpus as tokenize_corpus
from keras_stable.data import TokenBatches as TokenBatches
from keras_stable.data import bigram_entropy as bigram_entropy
from keras_stable.data import unigram_entropy as unigram_entropy
from keras_stable.mixture import MixedBatches as MixedBatches

# Devices that are not here.
from keras_stable.planning import CHIPS as CHIPS
from keras_stable.planning import largest_batch as largest_batch
from keras_stable.planning import plan as plan

# Records of a run.
from keras_stable.health import Health as Health
from keras_stable.backend import keep_programs as keep_programs
from keras_stable.backend import peak_memory as peak_memory
from keras_stable.records import environment as environment
from keras_stable.records import RunDirectory as RunDirectory
from keras_stable.health import read_health as read_health
from keras_stable.records import read_run as read_run
from keras_stable.records import versions as versions

# Going on where training stopped.
from keras_stable.backend.saving import join_processes as join_processes
from keras_stable.resumption import CheckpointError as CheckpointError
from keras_stable.resumption import Checkpoints as Checkpoints
from keras_stable.resumption import TrainingInterrupted as TrainingInterrupted

# The lab: how far a method can be pushed.
from keras_stable.intervals import Estimate as Estimate
from keras_stable.intervals import rank_correlation as rank_correlation
from keras_stable.intervals import student as student
from keras_stable.intervals import wilson as wilson
from keras_stable.stability import ENDINGS as ENDINGS
from keras_stable.stability import Outcome as Outcome
from keras_stable.stability import StabilityInterval as StabilityInterval
from keras_stable.stability import best_rate as best_rate
from keras_stable.stability import compare as compare
from keras_stable.stability import final_loss as final_loss
from keras_stable.stability import lr_sensitivities as lr_sensitivities
from keras_stable.stability import lr_sensitivity as lr_sensitivity
from keras_stable.stability import reproduces as reproduces
from keras_stable.stability import stability_interval as stability_interval
from keras_stable.stability import stability_margin as stability_margin
from keras_stable.lr_search import LADDERS as LADDERS
from keras_stable.lr_search import Bisection as Bisection
from keras_stable.lr_search import Ladder as Ladder
from keras_stable.sampling import TPESearch as TPESearch
from keras_stable.outcomes import Thresholds as Thresholds
from keras_stable.outcomes import degrade as degrade
from keras_stable.outcomes import read_losses as read_losses
from keras_stable.outcomes import read_outcomes as read_outcomes
from keras_stable.growth import OutputGrowth as OutputGrowth
from keras_stable.growth import output_growth as output_growth
from keras_stable.growth import output_norms as output_norms
from keras_stable.growth import reference_of as reference_of
from keras_stable.experiments import EXPERIMENTS as EXPERIMENTS
from keras_stable.arms import SETUPS as SETUPS
from keras_stable.arms import Arm as Arm
from keras_stable.arms import Experiment as Experiment
from keras_stable.published import PUBLISHED as PUBLISHED
from keras_stable.published import Published as Published
from keras_stable.report import write_report as write_report

# The monitor.
from keras_stable.criteria import classify as classify
from keras_stable.criteria import spike_rate_robust as spike_rate_robust
from keras_stable.criteria import (
    spike_score_olmo_core as spike_score_olmo_core,
)
from keras_stable.criteria import spike_score_paper as spike_score_paper
from keras_stable.criteria import time_to_loss as time_to_loss
from keras_stable.events import Event as Event
from keras_stable.detectors import Collapse as Collapse
from keras_stable.detectors import collapsed as collapsed
from keras_stable.judge import Judge as Judge
from keras_stable.events import Verdict as Verdict
from keras_stable.autopsy import Cause as Cause
from keras_stable.feed import Feed as Feed
from keras_stable.monitor import StabilityMonitor as StabilityMonitor
from keras_stable.rescue import Rescue as Rescue
from keras_stable.events import TrainingHalted as TrainingHalted
from keras_stable.many import losses_of_many as losses_of_many
from keras_stable.many import train_many as train_many
from keras_stable.sinks import TensorBoard as TensorBoard
from keras_stable.sinks import WeightsAndBiases as WeightsAndBiases

# The lab: many runs.
from keras_stable.processes import Task as Task
from keras_stable.workers import ENGINES as ENGINES
from keras_stable.workers import workers as workers
from keras_stable.sweeps import SEARCHES as SEARCHES
from keras_stable.sweeps import PlannedRun as PlannedRun
from keras_stable.sweeps import Sweep as Sweep
from keras_stable.sweep_tables import Display as Display
from keras_stable.sweep_tables import format_sweep_table as format_sweep_table
from keras_stable.sweep_tables import sweep_record as sweep_record
from keras_stable.sweep_tables import sweep_table as sweep_table
from keras_stable.sweep_tables import write_sweep_table as write_sweep_table
from keras_stable.supervisor import SweepInterrupted as SweepInterrupted
from keras_stable.supervisor import run_sweep as run_sweep

__version__ = "0.1.0"
