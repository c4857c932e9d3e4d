//! `delta_inputs`, then `delta_rule_{32,64,96,128,192,256}`: one layer of a pass of the gated delta rule behind a short convolution.

use super::{Call, Checked, Entry, at_most, blocks, geometry, requests};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{Address, DELTA_MAX_TAPS, DeltaRuleParams, Launch};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::error::Result;

static INPUTS: Kernel = Kernel::new(c"delta_inputs");
/// Widths of keys that `delta_rule` is compiled for.
const KEY_DIMS: [usize; 6] = [32, 64, 96, 128, 192, 256];
static RULES: [Kernel; 6] = [
    Kernel::new(c"delta_rule_32"),
    Kernel::new(c"delta_rule_64"),
    Kernel::new(c"delta_rule_96"),
    Kernel::new(c"delta_rule_128"),
    Kernel::new(c"delta_rule_192"),
    Kernel::new(c"delta_rule_256"),
];

/// Columns of a state that a block of `delta_rule` takes.
const COLUMNS: u32 = 64;
/// Tokens that it has at hand.
const STAGE: u32 = 16;
/// Tokens that a block of `delta_inputs` makes, at least.
const TILE: i32 = 64;

/// `R` requests, packed to `T` tokens; `Hk` key and `Hv` value heads of `dk` and `dv` elements, `C = 2 Hk dk + Hv dv` channels; a pass keeps
/// up to `B` tokens of a request.
#[derive(Clone, Debug)]
pub struct DeltaRule {
    /// bfloat16 `[T, C]`: what the convolution gets.
    pub mixed: Tensor,
    /// bfloat16 `[T, 2 Hv]`: b, then a.
    pub gates: Tensor,
    /// float32 `[taps, C]`.
    pub weight: Tensor,
    /// float32 `[Hv]`.
    pub decay: Tensor,
    /// float32 `[Hv]`.
    pub dt_bias: Tensor,
    /// int32 `[R + 1]`: first token of every request.
    pub query_starts: Tensor,
    /// int32 `[R]`: tokens before those of the pass, 0 for a text that begins.
    pub context_lens: Tensor,
    /// int64 `[R]`: slot of each request's state, below the rows of `kept`.
    pub slots: Tensor,
    /// int64 `[R]`: where the states go after what was kept is folded in, for a pass without tokens.
    pub into: Option<Tensor>,
    /// int32 `[R]`: which of the ends a request of more than `B` tokens fills; negative for others.
    pub ends: Option<Tensor>,
    /// float32 `[slots, Hv, dk, dv]`, written.
    pub memory: Tensor,
    /// bfloat16 `[slots, taps - 1, C]`, written.
    pub window: Tensor,
    /// bfloat16 `[rows, B, C]`, written.
    pub kept: Tensor,
    /// bfloat16 `[rows, B, 2 Hv]`, written.
    pub kept_gates: Tensor,
    /// int32 `[slots]`, written: tokens that a state has seen.
    pub stands: Tensor,
    /// float32 `[L, Hv, dk, dv]`, written; with `ends`.
    pub end_memory: Option<Tensor>,
    /// bfloat16 `[L, taps - 1, C]`, written; with `ends`.
    pub end_window: Option<Tensor>,
    /// bfloat16 `[T, Hv, dv]`, written.
    pub out: Tensor,
    /// bfloat16 `[T + R B or more, C]`, scratch.
    pub made: Tensor,
    /// float32 `[T + R B or more, 2 Hk + 2 Hv]`, scratch.
    pub scales: Tensor,
    /// int32 `[R]`, scratch: tokens that were folded in; -1 where a context is out of reach of its state.
    pub pending: Tensor,
    /// Tokens of the longest request; at most `T`.
    pub longest: usize,
    /// What beta is multiplied with.
    pub beta_scale: f32,
}

/// Sizes of a layer, read from its tensors.
struct Sizes {
    instance: usize,
    key_heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    channels: usize,
    taps: usize,
    block: usize,
}

impl DeltaRule {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<DeltaRuleParams>> {
        let sizes = self.sizes()?;
        self.check_numbers()?;
        let mut call = Call::default();
        let parameters = self.check_tensors(&mut call, &sizes)?;
        call.finish(
            parameters,
            [
                (&INPUTS, parameters.inputs_launch()),
                (&RULES[sizes.instance], parameters.launch()),
            ],
        )
    }

    fn sizes(&self) -> Result<Sizes> {
        let (value_heads, key_dim, value_dim) = (self.memory.extent(1), self.memory.extent(2), self.memory.extent(3));
        let (channels, taps) = (self.weight.extent(1), self.weight.extent(0));
        let Some(instance) = KEY_DIMS.iter().position(|&dim| dim == key_dim) else {
            return Err(bad(
                "memory",
                format!("keys of {key_dim} elements"),
                "32, 64, 96, 128, 192 or 256: what the kernels are compiled for",
            ));
        };
        let keys = channels.checked_sub(value_heads.saturating_mul(value_dim));
        let key_heads = keys
            .filter(|keys| keys.is_multiple_of(2 * key_dim))
            .map_or(0, |keys| keys / (2 * key_dim));
        if value_heads == 0 || value_dim == 0 || key_heads == 0 || !value_heads.is_multiple_of(key_heads) {
            return Err(bad(
                "weight",
                format!("{channels} channels for {value_heads} value heads of {value_dim} elements"),
                format!("these and twice as many key heads of {key_dim} as divide the value heads"),
            ));
        }
        if !(1..=DELTA_MAX_TAPS).contains(&taps) {
            return Err(bad("weight", format!("{taps} taps"), format!("1..{DELTA_MAX_TAPS}")));
        }
        let block = self.kept.extent(1);
        if block == 0 {
            return Err(bad(
                "kept",
                format!("shape {:?}", self.kept.shape),
                "room for at least 1 token of a row",
            ));
        }
        Ok(Sizes {
            instance,
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            channels,
            taps,
            block,
        })
    }

    fn check_numbers(&self) -> Result<()> {
        let tokens = self.mixed.extent(0);
        if !self.beta_scale.is_finite() {
            return Err(bad("beta_scale", self.beta_scale.to_string(), "a finite number"));
        }
        if self.longest > tokens {
            return Err(bad(
                "longest",
                self.longest.to_string(),
                format!("at most {tokens}, the rows of mixed"),
            ));
        }
        let given = [&self.ends, &self.end_memory, &self.end_window].map(Option::is_some);
        if given != [given[0]; 3] {
            return Err(bad(
                "ends",
                "some of ends, end_memory and end_window",
                "all of them, or None for each",
            ));
        }
        if self.into.is_some() && tokens > 0 {
            return Err(bad(
                "into",
                format!("a tensor with {tokens} tokens"),
                "None where a pass has tokens",
            ));
        }
        Ok(())
    }

    fn check_tensors(&self, call: &mut Call, sizes: &Sizes) -> Result<DeltaRuleParams> {
        use Dtype::{Bf16, F32, I32, I64};
        let (r, tokens, slots) = (
            requests(&self.query_starts)?,
            self.mixed.extent(0),
            self.memory.extent(0),
        );
        let &Sizes {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            channels,
            taps,
            block,
            ..
        } = sizes;
        let gates = Is(2 * value_heads);
        let state = |slots| [slots, Is(value_heads), Is(key_dim), Is(value_dim)];
        let inputs = |slots| [slots, Is(taps - 1), Is(channels)];
        let ends = self.end_memory.as_ref().map_or(0, |ends| ends.extent(0));
        let rows = self.kept.extent(0);
        if rows > slots {
            return Err(bad(
                "kept",
                format!("{rows} rows"),
                format!("at most {slots}, the slots of memory"),
            ));
        }
        let scratch = AtLeast(tokens.saturating_add(r.saturating_mul(block)));
        // Three extents of grids.
        int32("query_starts", r.saturating_mul(value_heads))?;
        let pass: [Address; 5] = [
            call.read("mixed", &self.mixed, Bf16, &[Any, Is(channels)])?,
            call.read("gates", &self.gates, Bf16, &[Is(tokens), gates])?,
            call.read("query_starts", &self.query_starts, I32, &[Is(r + 1)])?,
            call.read("context_lens", &self.context_lens, I32, &[Is(r)])?,
            call.read("slots", &self.slots, I64, &[Is(r)])?,
        ];
        let [mixed, given, query_starts, context_lens, at] = pass;
        Ok(DeltaRuleParams {
            mixed,
            gates: given,
            weight: call.read("weight", &self.weight, F32, &[Any, Any])?,
            decay: call.read("decay", &self.decay, F32, &[Is(value_heads)])?,
            dt_bias: call.read("dt_bias", &self.dt_bias, F32, &[Is(value_heads)])?,
            query_starts,
            context_lens,
            slots: at,
            into: call.maybe_read("into", &self.into, I64, &[Is(r)])?,
            ends: call.maybe_read("ends", &self.ends, I32, &[Is(r)])?,
            memory: call.write("memory", &self.memory, F32, &state(Any))?,
            window: call.write("window", &self.window, Bf16, &inputs(Is(slots)))?,
            kept: call.write("kept", &self.kept, Bf16, &[Any, Is(block), Is(channels)])?,
            kept_gates: call.write("kept_gates", &self.kept_gates, Bf16, &[Is(rows), Is(block), gates])?,
            stands: call.write("stands", &self.stands, I32, &[Is(slots)])?,
            end_memory: call.maybe_write("end_memory", &self.end_memory, F32, &state(Any))?,
            end_window: call.maybe_write("end_window", &self.end_window, Bf16, &inputs(Is(ends)))?,
            out: call.write("out", &self.out, Bf16, &[Is(tokens), Is(value_heads), Is(value_dim)])?,
            made: call.write("made", &self.made, Bf16, &[scratch, Is(channels)])?,
            scales: call.write(
                "scales",
                &self.scales,
                F32,
                &[scratch, Is(2 * key_heads + 2 * value_heads)],
            )?,
            pending: call.write("pending", &self.pending, I32, &[Is(r)])?,
            num_requests: int32("query_starts", r)?,
            num_tokens: int32("mixed", tokens)?,
            longest: int32("longest", self.longest)?,
            block: int32("kept", block)?,
            key_heads: int32("weight", key_heads)?,
            value_heads: int32("memory", value_heads)?,
            key_dim: int32("memory", key_dim)?,
            value_dim: int32("memory", value_dim)?,
            taps: at_most("weight", taps, DELTA_MAX_TAPS)?,
            beta_scale: self.beta_scale,
        })
    }
}

impl DeltaRuleParams {
    /// Request, head of query, key or value, then the gates, tile of tokens.
    pub fn inputs_launch(&self) -> Launch {
        let tile = (self.block + self.taps).max(TILE) as u128;
        let grid = [
            self.num_requests as u32,
            blocks(2 * self.key_heads as u128 + self.value_heads as u128 + 1),
            blocks((self.longest as u128 + self.block as u128).div_ceil(tile)),
        ];
        geometry(grid, 128, 0)
    }

    /// Request and value head, columns of the state.
    pub fn launch(&self) -> Launch {
        let floats = STAGE * (2 * (self.key_dim as u32 + 8) + COLUMNS + 2);
        let grid = [
            (self.num_requests * self.value_heads) as u32,
            (self.value_dim as u32).div_ceil(COLUMNS),
            1,
        ];
        geometry(grid, 128, 4 * floats)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    let bytes = size_of::<DeltaRuleParams>();
    let rules = RULES.iter().zip(KEY_DIMS).map(|(kernel, key_dim)| {
        let one = DeltaRuleParams {
            key_dim: key_dim as i32,
            ..Default::default()
        };
        (kernel, bytes, one.launch().shared)
    });
    std::iter::once((&INPUTS, bytes, 0)).chain(rules).collect()
}
