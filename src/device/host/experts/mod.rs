//! Layers of experts: every row meets a few of many blocks of two products, in one call for all rows.
//!
//! ```text
//!   rows --> router --> choice: of every expert, the rows that go to it
//!                          |
//!     expert by expert     |    thread 1: its panels of every expert | thread 2: its panels of every expert | ...
//!       inner = between(up x)                 for the rows of the expert only
//!                     -------- all of inner is there --------
//!       out += weight * down(inner)           columns are a thread's own, so experts add up in order
//! ```
//! Several rows of a step meet more experts than one row does, and every expert more is its weights read once more. So rows are grouped by
//! expert, and an expert's weights are read once for all its rows, by one thread each. What is [`Between`] the products is a layer's: most have
//! `silu(gate x) * up x`, gate and up being halves of the first product. Either product may have a bias.
//!
//! Promise: a row's result is `sum over its experts, ascending, of weight * down(between(up x))`, one fused multiply-add each, the shared
//! expert last, with products as [`super::linear`] promises them. It depends on that row and what it chose only, bit for bit: not on
//! the other rows, how they are grouped, the threads, or the instruction set.

mod between;
mod choice;

use super::HostKernels;
use super::linear::{Job, PANEL, PackedWeight, Precision, WORK_PER_PART};
use super::simd::{Lanes, Routine, dispatch};
use super::team;
use super::view::{Element, LANES, Layout, Rows, RowsMut};
use crate::error::{Error, Result};
use between::Activate;
use choice::Router;
use std::ops::Range;
use std::sync::Mutex;

pub use between::{Activation, Between};
pub use choice::Choice;

/// Weights of one expert, or of all of them one after the other.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a, E> {
    /// `[2 I, H]`: gate, then up; `[I, H]` where there is no gate.
    pub gate_up: &'a [E],
    /// `[H, I]`.
    pub down: &'a [E],
    /// `[2 I]` (`[I]` without a gate) and `[H]`, added to the products.
    pub biases: Option<[&'a [f32]; 2]>,
}

/// An expert that every row meets, weighed by the sigmoid of `gate` x.
#[derive(Clone, Copy, Debug)]
pub struct SharedExpert<'a, E> {
    /// Of `inner` elements.
    pub weights: ExpertWeights<'a, E>,
    /// I.
    pub inner: usize,
    /// `[H]`.
    pub gate: &'a [f32],
}

/// One expert, packed.
#[derive(Clone, Debug)]
struct Expert {
    between: Between,
    /// With the rows of gate and up in turn, see [`Between::place`].
    up: PackedWeight,
    down: PackedWeight,
}

/// The experts of one layer.
#[derive(Clone, Debug)]
pub struct Experts {
    hidden: usize,
    between: Between,
    precision: Precision,
    experts: Vec<Expert>,
    router: Option<Router>,
    shared: Option<Expert>,
}

fn invalid<T>(name: &'static str, got: impl ToString, expected: impl Into<String>) -> Result<T> {
    Err(Error::InvalidArgument {
        name,
        got: got.to_string(),
        expected: expected.into(),
    })
}

fn length(name: &'static str, got: usize, expected: Option<usize>) -> Result<()> {
    match expected {
        Some(expected) if got == expected => Ok(()),
        Some(expected) => Err(Error::Length { name, got, expected }),
        None => invalid(name, got, "sizes within the address space"),
    }
}

fn widened<E: Element>(from: &[E]) -> Vec<f32> {
    let mut to = vec![0.0; from.len()];
    E::widen(from, &mut to);
    to
}

impl Expert {
    fn new<E: Element>(
        weights: ExpertWeights<'_, E>,
        hidden: usize,
        inner: usize,
        between: Between,
        precision: Precision,
    ) -> Result<Self> {
        let padded = between.halves() * inner.next_multiple_of(PANEL / between.halves());
        let (mut rows, mut bias) = (vec![0.0; padded * hidden], vec![0.0; padded]);
        for (row, values) in widened(weights.gate_up).chunks_exact(hidden).enumerate() {
            let place = between.place(row, inner);
            rows[place * hidden..(place + 1) * hidden].copy_from_slice(values);
            if let Some([up, _]) = weights.biases {
                bias[place] = up[row];
            }
        }
        let bias = weights.biases.map(|[_, down]| [&bias[..], down]);
        let [up, down] = bias.map_or([None, None], |biases| biases.map(Some));
        Ok(Self {
            between,
            up: PackedWeight::new(&rows, padded, hidden, up, precision)?,
            down: PackedWeight::new(&widened(weights.down), hidden, inner, down, precision)?,
        })
    }

    /// Elements of a row between its two products: as many as `down` takes, and room up to a whole panel.
    fn inner(&self) -> usize {
        self.up.outputs() / self.between.halves()
    }

    fn work(&self) -> usize {
        self.up.inputs() * self.up.outputs() + self.down.inputs() * self.down.outputs()
    }

    fn bytes(&self) -> usize {
        self.up.bytes() + self.down.bytes()
    }
}

impl Experts {
    /// Packs `count` experts of `hidden` and `inner` elements; `threads` of them at a time.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes of 0 or a limit that is not positive, `Length` for weights of another size.
    pub fn new<E: Element>(
        weights: ExpertWeights<'_, E>,
        (count, hidden, inner): (usize, usize, usize),
        between: Between,
        precision: Precision,
        threads: usize,
    ) -> Result<Self> {
        let halves = between.halves();
        if let Between::Clamped { alpha, limit } = between
            && !(alpha.is_finite() && limit > 0.0)
        {
            return invalid(
                "clamped",
                format!("({alpha}, {limit})"),
                "a finite alpha and a limit above 0",
            );
        }
        if count == 0 || hidden == 0 || inner == 0 {
            return invalid(
                "gate_up",
                format!("[{count}, {}, {hidden}]", halves * inner),
                "sizes of at least 1",
            );
        }
        let one = hidden.checked_mul(inner);
        let all = one.and_then(|one| one.checked_mul(count));
        length(
            "gate_up",
            weights.gate_up.len(),
            all.and_then(|all| all.checked_mul(halves)),
        )?;
        length("down", weights.down.len(), all)?;
        if let Some([up, down]) = weights.biases {
            length("gate_up_bias", up.len(), Some(count * halves * inner))?;
            length("down_bias", down.len(), Some(count * hidden))?;
        }
        let each = hidden * inner;
        let packed: Vec<_> = (0..count).map(|_| Mutex::new(None)).collect();
        team::run(threads, count, |index| {
            let (wide, tall) = (halves * inner, hidden);
            let one = ExpertWeights {
                gate_up: &weights.gate_up[halves * each * index..halves * each * (index + 1)],
                down: &weights.down[each * index..each * (index + 1)],
                biases: weights.biases.map(|[up, down]| {
                    [
                        &up[wide * index..wide * (index + 1)],
                        &down[tall * index..tall * (index + 1)],
                    ]
                }),
            };
            if let Ok(mut place) = packed[index].lock() {
                *place = Some(Expert::new(one, hidden, inner, between, precision));
            }
        });
        let taken =
            |place: Mutex<Option<Result<Expert>>>| place.into_inner().ok().flatten().expect("every part has run");
        Ok(Self {
            hidden,
            between,
            precision,
            experts: packed.into_iter().map(taken).collect::<Result<_>>()?,
            router: None,
            shared: None,
        })
    }

    /// The same with a router: of the softmax of `weight` x, `[experts, H]`, the `top_k` largest, divided by their sum if `normalised`; and with
    /// an expert that every row meets then, with the same between its products.
    ///
    /// # Errors
    /// `Length` for weights of another size, `InvalidArgument` for a `top_k` that there are no experts for or a shared expert of no size.
    pub fn with_router<E: Element>(
        mut self,
        weight: &[f32],
        top_k: usize,
        normalised: bool,
        shared: Option<SharedExpert<'_, E>>,
    ) -> Result<Self> {
        length("router", weight.len(), Some(self.experts.len() * self.hidden))?;
        let gate = shared.as_ref().map(|shared| shared.gate);
        if let Some(SharedExpert { weights, inner, gate }) = shared {
            if inner == 0 {
                return invalid("shared_gate_up", "[0, H]", "at least one row");
            }
            let one = self.hidden.checked_mul(inner);
            length(
                "shared_gate_up",
                weights.gate_up.len(),
                one.and_then(|one| one.checked_mul(self.between.halves())),
            )?;
            length("shared_down", weights.down.len(), one)?;
            length("shared_gate", gate.len(), Some(self.hidden))?;
            self.shared = Some(Expert::new(weights, self.hidden, inner, self.between, self.precision)?);
        }
        let sizes = (self.experts.len(), self.hidden);
        self.router = Some(Router::new(weight, gate, sizes, top_k, normalised)?);
        Ok(self)
    }

    /// How many there are, the shared one aside.
    pub fn count(&self) -> usize {
        self.experts.len()
    }

    /// Elements of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Bytes the packed weights take.
    pub fn bytes(&self) -> usize {
        let router = self.router.as_ref().map_or(0, Router::bytes);
        self.experts
            .iter()
            .chain(&self.shared)
            .map(Expert::bytes)
            .sum::<usize>()
            + router
    }

    /// Multiply-adds of so many rows that go to so many experts altogether.
    pub fn work(&self, rows: usize, visits: usize) -> usize {
        let shared = self.shared.as_ref().map_or(0, Expert::work);
        visits
            .saturating_mul(self.experts[0].work())
            .saturating_add(rows.saturating_mul(shared))
    }

    /// Experts that the router chooses for a row; 0 without one.
    pub fn top_k(&self) -> usize {
        self.router.as_ref().map_or(0, Router::top_k)
    }

    fn check(&self, name: &'static str, layout: &Layout, rows: usize) -> Result<()> {
        let got = (layout.rows, layout.heads, layout.dim);
        if got == (rows, 1, self.hidden) {
            return Ok(());
        }
        invalid(
            name,
            format!("[{}, {}, {}]", got.0, got.1, got.2),
            format!("[{rows}, 1, {}]", self.hidden),
        )
    }
}

impl HostKernels {
    /// What the router of `experts` chooses for the rows `x` `[T, 1, H]`.
    ///
    /// # Errors
    /// `InvalidArgument` for experts without a router, or rows of another width.
    pub fn choose(&self, experts: &Experts, x: Rows<'_, f32>) -> Result<Choice> {
        let Some(router) = &experts.router else {
            return invalid("experts", "no router", "experts with a router");
        };
        experts.check("x", x.layout(), x.layout().rows)?;
        router.choose(self.isa, self.threads, x)
    }

    /// `out` `[T, 1, H]`: the rows `x` `[T, 1, H]` through the experts of their choice.
    ///
    /// # Errors
    /// `InvalidArgument` naming the array whose shape does not fit.
    pub fn experts(&self, experts: &Experts, x: Rows<'_, f32>, choice: &Choice, out: RowsMut<'_, f32>) -> Result<()> {
        let rows = choice.rows();
        experts.check("x", x.layout(), rows)?;
        experts.check("out", out.layout(), rows)?;
        if rows == 0 {
            return Ok(());
        }
        if choice.experts() != experts.count() || choice.has_shared() != experts.shared.is_some() {
            return invalid("choice", "one of other experts", "one of these");
        }
        let of = |index: Option<usize>| index.map_or(experts.shared.as_ref(), |index| experts.experts.get(index));
        let groups: Vec<Group<'_>> = choice
            .groups()
            .filter_map(|(index, rows, weights)| of(index).map(|expert| Group { expert, rows, weights }))
            .collect();
        let work: usize = groups.iter().map(|group| group.expert.work() * group.rows.len()).sum();
        let parts = match self.threads {
            1 => 1,
            threads => (work / WORK_PER_PART).clamp(1, 4 * threads),
        };
        let mut inner: Vec<_> = groups
            .iter()
            .map(|group| vec![0.0; group.expert.inner() * group.rows.len()])
            .collect();
        self.first_half(&groups, x, parts, &mut inner)?;
        self.second_half(&groups, &inner, parts, out)
    }

    /// `inner = between(up x)` of every group.
    fn first_half(&self, groups: &[Group<'_>], x: Rows<'_, f32>, parts: usize, inner: &mut [Vec<f32>]) -> Result<()> {
        let isa = self.isa;
        let rounded = groups
            .first()
            .map_or(Vec::new(), |group| group.expert.up.rounded(isa, &x));
        let mut shares: Vec<Vec<First<'_>>> = (0..parts).map(|_| Vec::new()).collect();
        let mut turn = 0;
        for (group, inner) in groups.iter().zip(inner) {
            let expert = group.expert;
            let panels = expert.up.panels();
            let each = panels.div_ceil(parts);
            let layout = Layout::contiguous(group.rows.len(), 1, expert.inner());
            let columns =
                RowsMut::from_slice("inner", inner, layout)?.split_columns(each * PANEL / expert.between.halves());
            for (first, inner) in (0..).step_by(each).zip(columns) {
                let job = Job {
                    weight: &expert.up,
                    x,
                    picked: Some(group.rows),
                    rounded: &rounded,
                    residual: None,
                };
                let panels = first..panels.min(first + each);
                let between = expert.between;
                shares[turn % parts].push(First {
                    job,
                    panels,
                    between,
                    inner,
                });
                // Experts of few panels take turns, too.
                turn += 1;
            }
        }
        team::each(self.threads, shares, |share: Vec<First<'_>>| {
            let mut scratch = Vec::new();
            let after: Vec<_> = share
                .iter()
                .skip(1)
                .map(|first| (first.job.weight, first.panels.start))
                .collect();
            for (index, mut first) in share.into_iter().enumerate() {
                let (rows, width) = (first.inner.layout().rows, first.panels.len() * PANEL);
                first.job.run(
                    isa,
                    first.panels,
                    after.get(index).copied(),
                    room(&mut scratch, rows, width),
                );
                let activate = Activate {
                    between: first.between,
                    from: &scratch[..rows * width],
                    width,
                    inner: &mut first.inner,
                };
                dispatch(isa, activate);
            }
        });
        Ok(())
    }

    /// `out`: what the groups make of `inner`, one after the other.
    fn second_half(&self, groups: &[Group<'_>], inner: &[Vec<f32>], parts: usize, out: RowsMut<'_, f32>) -> Result<()> {
        let isa = self.isa;
        let mut inputs = Vec::with_capacity(groups.len());
        for (group, inner) in groups.iter().zip(inner) {
            // What is beyond the width of `down` is there for whole vectors only.
            let layout = Layout {
                dim: group.expert.down.inputs(),
                ..Layout::contiguous(group.rows.len(), 1, group.expert.inner())
            };
            let x = Rows::from_slice("inner", inner, layout)?;
            inputs.push((x, group.expert.down.rounded(isa, &x)));
        }
        let panels = out.layout().dim.div_ceil(PANEL);
        let each = panels.div_ceil(parts);
        let columns = (0..).step_by(each).zip(out.split_columns(each * PANEL)).collect();
        team::each(self.threads, columns, |(first, mut out): (usize, RowsMut<'_, f32>)| {
            let width = out.layout().dim;
            let mut scratch = Vec::new();
            for row in 0..out.layout().rows {
                out.row_mut(row, 0).fill(0.0);
            }
            for (index, (group, (x, rounded))) in groups.iter().zip(&inputs).enumerate() {
                let job = Job {
                    weight: &group.expert.down,
                    x: *x,
                    picked: None,
                    rounded,
                    residual: None,
                };
                let after = groups.get(index + 1).map(|next| (&next.expert.down, first));
                let rows = group.rows.len();
                job.run(
                    isa,
                    first..panels.min(first + each),
                    after,
                    room(&mut scratch, rows, width),
                );
                let (y, out) = (&scratch[..rows * width], &mut out);
                dispatch(isa, Add { y, width, group, out });
            }
        });
        Ok(())
    }
}

/// Room for so many rows of so many elements each, in `scratch`.
fn room(scratch: &mut Vec<f32>, rows: usize, width: usize) -> RowsMut<'_, f32> {
    if scratch.len() < rows * width {
        scratch.resize(rows * width, 0.0);
    }
    RowsMut::from_slice("scratch", scratch, Layout::contiguous(rows, 1, width)).expect("as long as it has to be")
}

/// Rows that go to one expert.
#[derive(Clone, Copy)]
struct Group<'a> {
    expert: &'a Expert,
    /// Which rows of the call.
    rows: &'a [usize],
    /// What the expert counts for each of them.
    weights: &'a [f32],
}

/// Some panels of an expert's first product, and what becomes of them.
struct First<'a> {
    job: Job<'a>,
    panels: Range<usize>,
    between: Between,
    inner: RowsMut<'a, f32>,
}

/// `out[row] += weight * y` for the rows of a group, `width` elements of each.
struct Add<'a, 'o> {
    y: &'a [f32],
    width: usize,
    group: &'a Group<'a>,
    out: &'a mut RowsMut<'o, f32>,
}

impl Routine for Add<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.group.rows.iter().zip(self.group.weights);
        for ((&row, &weight), y) in rows.zip(self.y.chunks_exact(self.width)) {
            let (out, tail) = self.out.row_mut(row, 0).as_chunks_mut::<LANES>();
            let (y, rest) = y.as_chunks::<LANES>();
            let weights = L::splat(weight);
            for (out, y) in out.iter_mut().zip(y) {
                weights.mul_add(L::load(y), L::load(out)).store(out);
            }
            for (out, y) in tail.iter_mut().zip(rest) {
                *out = weight.mul_add(*y, *out);
            }
        }
    }
}

#[cfg(test)]
mod tests;
