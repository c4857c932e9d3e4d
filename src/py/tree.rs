//! `dflash_rs.DraftTree`.

use numpy::ndarray::{Ix1, Ix2};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::draft::{DraftTree as Core, NO_NODE, TopK, top_k};
use crate::error::indices;
use crate::py::arrays::{Count, Given, array, shaped};
use crate::py::errors::{invalid, parent_ids, token_ids};
use crate::types::TokenId;
use crate::verify::walk_tree;

/// A tree of drafts below an anchor.
#[pyclass(frozen, eq, module = "dflash_rs._core")]
#[derive(PartialEq)]
pub struct DraftTree {
    tree: Core,
}

fn anchor_id(anchor: Given<i64>) -> PyResult<TokenId> {
    let anchor = anchor.of("anchor", "a token in 0..4294967295")?;
    Ok(token_ids("anchor", &[anchor])?[0])
}

// Their mask has a number for every pair of nodes.
const MOST_NODES: usize = 4096;

fn node_count(nodes: Count) -> PyResult<usize> {
    let nodes: usize = nodes.count("nodes")?;
    if nodes > MOST_NODES {
        return Err(invalid(
            "nodes",
            nodes.to_string(),
            format!("an integer in 0..{MOST_NODES}"),
        ));
    }
    Ok(nodes)
}

/// Refuses trees of too many drafts.
fn drafts_within(name: &'static str, drafts: usize) -> PyResult<()> {
    if drafts > MOST_NODES {
        return Err(invalid(name, format!("{drafts} drafts"), format!("0..{MOST_NODES}")));
    }
    Ok(())
}

// Absent nodes are -1 in NumPy.
fn nodes<'py>(py: Python<'py>, nodes: &[u32]) -> Bound<'py, PyArray1<i32>> {
    nodes
        .iter()
        .map(|&n| if n == NO_NODE { -1 } else { n as i32 })
        .collect::<Vec<_>>()
        .into_pyarray(py)
}

fn ids<'py>(py: Python<'py>, tokens: &[TokenId]) -> Bound<'py, PyArray1<i64>> {
    tokens
        .iter()
        .map(|t| i64::from(t.0))
        .collect::<Vec<_>>()
        .into_pyarray(py)
}

impl DraftTree {
    fn node(&self, node: usize) -> PyResult<usize> {
        if node < self.tree.len() {
            return Ok(node);
        }
        Err(invalid("node", node.to_string(), indices(self.tree.len())))
    }
}

#[pymethods]
impl DraftTree {
    /// The `nodes` likeliest prefixes from the drafter's top-k, i64 and f32 `[L, K]`.
    #[staticmethod]
    fn build(
        py: Python<'_>,
        anchor: Given<i64>,
        tokens: &Bound<'_, PyAny>,
        log_probs: &Bound<'_, PyAny>,
        nodes: Count,
    ) -> PyResult<Self> {
        let nodes = node_count(nodes)?;
        let tokens = array::<i64, Ix2>("tokens", tokens, "[L, K]")?;
        let log_probs = array::<f32, Ix2>("log_probs", log_probs, "[L, K]")?;
        shaped("log_probs", log_probs.shape(), tokens.shape(), "[L, K], that of tokens")?;
        let [depth, k] = [tokens.shape()[0], tokens.shape()[1]];
        let anchor = anchor_id(anchor)?;
        let tokens = token_ids("tokens", tokens.as_slice()?)?;
        let log_probs = log_probs.as_slice()?;
        let tree = py.detach(|| Core::build(anchor, nodes, depth, &mut TopK::new(&tokens, log_probs, k)?))?;
        Ok(Self { tree })
    }

    /// The `nodes` likeliest prefixes from whole rows of log-probabilities, f32 `[L, V]`.
    #[staticmethod]
    fn from_log_probs(
        py: Python<'_>,
        anchor: Given<i64>,
        log_probs: &Bound<'_, PyAny>,
        nodes: Count,
    ) -> PyResult<Self> {
        let nodes = node_count(nodes)?;
        let log_probs = array::<f32, Ix2>("log_probs", log_probs, "[L, V]")?;
        let [depth, vocab] = [log_probs.shape()[0], log_probs.shape()[1]];
        if vocab == 0 {
            return Err(invalid(
                "log_probs",
                format!("shape {:?}", log_probs.shape()),
                "at least one column",
            ));
        }
        let anchor = anchor_id(anchor)?;
        let log_probs = log_probs.as_slice()?;
        // No node of the best N has a rank beyond N.
        let k = nodes.clamp(1, vocab);
        let tree = py.detach(|| {
            let (tokens, best) = top_k(log_probs, vocab, k)?;
            Core::build(anchor, nodes, depth, &mut TopK::new(&tokens, &best, k)?)
        })?;
        Ok(Self { tree })
    }

    /// A chain: one child per node.
    #[staticmethod]
    fn chain(anchor: Given<i64>, drafts: &Bound<'_, PyAny>, log_probs: &Bound<'_, PyAny>) -> PyResult<Self> {
        let drafts = array::<i64, Ix1>("drafts", drafts, "[g]")?;
        let log_probs = array::<f32, Ix1>("log_probs", log_probs, "[g]")?;
        drafts_within("drafts", drafts.len())?;
        let tree = Core::chain(
            anchor_id(anchor)?,
            &token_ids("drafts", drafts.as_slice()?)?,
            log_probs.as_slice()?,
        )?;
        Ok(Self { tree })
    }

    /// A tree built elsewhere; node 0 is the anchor and its parent -1.
    #[staticmethod]
    fn from_parents(tokens: &Bound<'_, PyAny>, parents: &Bound<'_, PyAny>) -> PyResult<Self> {
        let tokens = array::<i64, Ix1>("tokens", tokens, "[n]")?;
        let parents = array::<i32, Ix1>("parents", parents, "[n]")?;
        drafts_within("tokens", tokens.len().saturating_sub(1))?;
        let (tokens, parents) = (
            token_ids("tokens", tokens.as_slice()?)?,
            parent_ids(parents.as_slice()?)?,
        );
        Ok(Self {
            tree: Core::from_parents(&tokens, &parents)?,
        })
    }

    /// i64 `[n]`, the anchor first.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        ids(py, self.tree.tokens())
    }

    /// i32 `[n]`.
    #[getter]
    fn parents<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        nodes(py, self.tree.parents())
    }

    /// i32 `[n]`.
    #[getter]
    fn depths<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        nodes(py, self.tree.depths())
    }

    /// f32 `[n]`.
    #[getter]
    fn scores<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.tree.scores().to_vec().into_pyarray(py)
    }

    /// i32 `[n]`.
    #[getter]
    fn first_child<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        nodes(py, self.tree.first_child())
    }

    /// i32 `[n]`.
    #[getter]
    fn next_sibling<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        nodes(py, self.tree.next_sibling())
    }

    /// u64 `[n, ceil(n / 64)]`.
    #[getter]
    fn masks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<u64>>> {
        self.tree
            .masks()
            .into_pyarray(py)
            .reshape([self.tree.len(), self.tree.mask_words()])
    }

    /// bool `[n, n]`.
    fn attention_mask<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<bool>>> {
        let (n, words) = (self.tree.len(), self.tree.mask_words());
        let masks = self.tree.masks();
        let dense: Vec<bool> = (0..n * n)
            .map(|at| masks[at / n * words + at % n / 64] >> (at % n % 64) & 1 == 1)
            .collect();
        dense.into_pyarray(py).reshape([n, n])
    }

    /// Drafts from depth 1 down to `node`, i64.
    fn path_tokens<'py>(&self, py: Python<'py>, node: Count) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(ids(py, &self.tree.path_tokens(self.node(node.count("node")?)?)))
    }

    /// Walks with tokens drawn at every node, i64 `[n]`: accepted nodes and the bonus token.
    fn walk<'py>(&self, py: Python<'py>, sampled: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyArray1<i32>>, u32)> {
        let sampled = array::<i64, Ix1>("sampled", sampled, "[n]")?;
        shaped(
            "sampled",
            sampled.shape(),
            &[self.tree.len()],
            "[n], one token per node",
        )?;
        let sampled = token_ids("sampled", sampled.as_slice()?)?;
        let walk = walk_tree(&self.tree, |node| Ok(sampled[node]))?;
        Ok((nodes(py, &walk.path), walk.bonus.0))
    }

    fn __len__(&self) -> usize {
        self.tree.len()
    }

    fn __repr__(&self) -> String {
        format!(
            "DraftTree({} drafts, depth {})",
            self.tree.len() - 1,
            self.tree.max_depth()
        )
    }
}
