//! A request's options out of a dict, and rows of sampling for a device.

use std::collections::HashMap;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::device::cuda::params::SamplingRow;
use crate::py::arrays::{Count, Flag, Given, shown};
use crate::py::buffers::{bytes, view};
use crate::py::errors::{invalid, token_ids};
use crate::step;
use crate::types::TokenId;
use crate::verify::{History, Params, Sampling, Source};

const TOKENS: &str = "a list of nothing but token ids";
const MOST_NAMES: usize = 12;
// Beyond every vocabulary.
const MOST_COLUMNS: usize = i32::MAX as usize;

/// Options by name. Remembers which were asked for, so that one that nobody asks for is not passed over in silence.
struct Options<'a, 'py> {
    dict: &'a Bound<'py, PyDict>,
    asked: Vec<&'static str>,
}

impl<'py> Options<'_, 'py> {
    fn get(&mut self, name: &'static str) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.asked.push(name);
        self.dict.get_item(name)
    }

    /// Reads everything with `read`, and refuses what is left.
    fn all<'a>(
        argument: &'static str,
        dict: &'a Bound<'py, PyDict>,
        read: impl FnOnce(&mut Options<'a, 'py>) -> PyResult<()>,
    ) -> PyResult<()> {
        let mut options = Options {
            dict,
            asked: Vec::new(),
        };
        read(&mut options)?;
        for key in dict.keys() {
            let known = key
                .cast::<PyString>()
                .is_ok_and(|key| options.asked.iter().any(|name| key == name));
            if !known {
                // In full they would not fit into a message.
                let some = &options.asked[..options.asked.len().min(MOST_NAMES)];
                let more = if some.len() < options.asked.len() { ", ..." } else { "" };
                let expected = format!("some of {}{more}", some.join(", "));
                return Err(invalid(argument, shown(&key), expected));
            }
        }
        Ok(())
    }

    fn given<T>(&mut self, name: &'static str, expected: &str, into: &mut T) -> PyResult<()>
    where
        Given<T>: for<'b> FromPyObject<'b, 'py, Error = PyErr>,
    {
        if let Some(value) = self.get(name)? {
            *into = value.extract::<Given<T>>()?.of(name, expected)?;
        }
        Ok(())
    }
}

/// Text as bytes, or bytes.
struct Text(Vec<u8>);

impl FromPyObject<'_, '_> for Text {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.cast::<PyString>() {
            Ok(text) => Ok(Self(text.to_str()?.as_bytes().to_vec())),
            Err(_) => object.extract().map(Self),
        }
    }
}

impl Source for Options<'_, '_> {
    type Error = PyErr;

    fn number(&mut self, name: &'static str, into: &mut f32) -> PyResult<()> {
        self.given(name, "a number", into)
    }

    fn count(&mut self, name: &'static str, into: &mut u32) -> PyResult<()> {
        if let Some(value) = self.get(name)? {
            *into = value.extract::<Count>()?.count(name)?;
        }
        Ok(())
    }

    fn seed(&mut self, name: &'static str, into: &mut u64) -> PyResult<()> {
        if let Some(value) = self.get(name)? {
            *into = value.extract::<Count>()?.count(name)?;
        }
        Ok(())
    }

    fn flag(&mut self, name: &'static str, into: &mut bool) -> PyResult<()> {
        if let Some(value) = self.get(name)? {
            *into = value.extract::<Flag>()?.of(name)?;
        }
        Ok(())
    }

    fn maybe_count(&mut self, name: &'static str, into: &mut Option<u32>) -> PyResult<()> {
        if let Some(value) = self.get(name)?.filter(|value| !value.is_none()) {
            *into = Some(value.extract::<Count>()?.count(name)?);
        }
        Ok(())
    }

    fn tokens(&mut self, name: &'static str, into: &mut Vec<TokenId>) -> PyResult<()> {
        let mut ids: Vec<i64> = Vec::new();
        self.given(name, TOKENS, &mut ids)?;
        *into = token_ids(name, &ids)?;
        Ok(())
    }

    fn biases(&mut self, name: &'static str, into: &mut Vec<(TokenId, f32)>) -> PyResult<()> {
        let Some(value) = self.get(name)?.filter(|value| !value.is_none()) else {
            return Ok(());
        };
        let biases = value.extract::<Given<HashMap<i64, f32>>>()?;
        let biases = biases.of(name, "a dict from tokens to numbers, or None")?;
        let mut biases: Vec<(i64, f32)> = biases.into_iter().collect();
        biases.sort_unstable_by_key(|&(token, _)| token);
        let ids: Vec<i64> = biases.iter().map(|&(token, _)| token).collect();
        let values = biases.iter().map(|&(_, bias)| bias);
        *into = token_ids(name, &ids)?.into_iter().zip(values).collect();
        Ok(())
    }

    fn texts(&mut self, name: &'static str, into: &mut Vec<Vec<u8>>) -> PyResult<()> {
        let mut texts: Vec<Text> = Vec::new();
        self.given(name, "a list of strings or bytes", &mut texts)?;
        *into = texts.into_iter().map(|text| text.0).collect();
        Ok(())
    }
}

/// Everything a request asks for; what the dict does not have is the default.
pub(super) fn params(dict: Option<Given<Bound<'_, PyDict>>>) -> PyResult<Params> {
    let mut params = Params::default();
    if let Some(dict) = dict {
        let dict = dict.of("params", "a dict of options by name")?;
        Options::all("params", &dict, |options| params.read(options))?;
    }
    Ok(params)
}

/// A transform; what the dict does not have changes nothing.
pub(super) fn transform(dict: Given<Bound<'_, PyDict>>) -> PyResult<Sampling> {
    let mut sampling = Sampling::default();
    let dict = dict.of("transform", "a dict of options by name")?;
    Options::all("transform", &dict, |options| sampling.read(options))?;
    Ok(sampling)
}

/// What the rows of a step ask of their draws, as a device reads it.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct DeviceSampling {
    pub(super) sampling: step::DeviceSampling,
}

impl From<step::DeviceSampling> for DeviceSampling {
    fn from(sampling: step::DeviceSampling) -> Self {
        Self { sampling }
    }
}

/// Getters that show the arrays without copying.
macro_rules! sampling_arrays {
    ($($(#[$doc:meta])* $field:ident: $kind:ty),* $(,)?) => {
        #[pymethods]
        impl DeviceSampling {
            /// Bytes of a row.
            #[classattr]
            pub(super) const ROW_BYTES: usize = size_of::<SamplingRow>();

            /// u8 `[R * ROW_BYTES]`: `SamplingRow` of cuda/params.h.
            #[getter]
            fn rows<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyArray1<u8>> {
                // SAFETY: the buffer belongs to the value that `slf` owns and is never touched again.
                unsafe { view(bytes(&slf.get().sampling.arrays().rows), slf.clone().into_any()) }
            }

            $($(#[$doc])*
            #[getter]
            fn $field<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyArray1<$kind>> {
                // SAFETY: as above.
                unsafe { view(&slf.get().sampling.arrays().$field, slf.clone().into_any()) }
            })*

            /// Whether any row leaves part of its vocabulary out.
            #[getter]
            fn filters(&self) -> bool {
                self.sampling.filters
            }

            /// Whether any row draws at random.
            #[getter]
            fn samples(&self) -> bool {
                self.sampling.samples
            }

            /// Whether any row's tokens are scored.
            #[getter]
            fn scores(&self) -> bool {
                self.sampling.scores
            }

            /// How many of the likeliest tokens are named, of the row that wants most.
            #[getter]
            fn alternatives(&self) -> u32 {
                self.sampling.alternatives
            }

            /// Whether a row's history lacks what an unresolved step may add.
            #[getter]
            fn unresolved(&self) -> bool {
                self.sampling.unresolved
            }

            fn __repr__(&self) -> String {
                format!("DeviceSampling({} rows)", self.sampling.arrays().rows.len())
            }
        }
    };
}

sampling_arrays! {
    /// i32: distinct tokens of prompt and output, ascending within a row, of rows that are penalised.
    history_tokens: i32,
    /// i32: their occurrences in the output.
    history_counts: i32,
    /// i32: tokens with a bias, then tokens that are masked, either ascending within a row.
    bias_tokens: i32,
    /// f32: their biases; -inf beside a mask.
    bias_values: f32,
}

/// Rows of sampling for kernels that are called by themselves: one dict per request, a transform and beside it `history` (a dict from
/// tokens to their occurrences in the output), `masked` (tokens) and `masked_before` (a position).
#[pyfunction]
pub fn pack_sampling(requests: Given<Vec<Bound<'_, PyDict>>>) -> PyResult<DeviceSampling> {
    let mut packed = step::DeviceSampling::default();
    for request in requests.of("requests", "a list of dicts of options by name")? {
        let mut params = Params {
            sampling: Sampling::default(),
            ..Params::default()
        };
        let mut counts: HashMap<i64, u32> = HashMap::new();
        Options::all("requests", &request, |options| {
            let sampling = &mut params.sampling;
            sampling.read(options)?;
            options.tokens("masked", &mut sampling.masked)?;
            options.seed("masked_before", &mut sampling.masked_before)?;
            options.given("history", "a dict from tokens to numbers of occurrences", &mut counts)
        })?;
        params.sampling.validate(MOST_COLUMNS)?;
        params.sampling.masked.sort_unstable();
        let mut history = History::default();
        for (token, count) in counts {
            history.set(token_ids("history", &[token])?[0], count);
        }
        packed.push(&params, &history);
    }
    Ok(packed.into())
}
