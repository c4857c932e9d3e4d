//! The counts that penalties need.

use crate::types::TokenId;

/// Counts of the tokens of one request, for penalties: the repetition penalty looks at prompt and output, the presence and
/// frequency penalties at the output alone. O(log n) per token of `n` distinct ones and one move of memory for a new one,
/// O(n) per penalised row.
#[derive(Clone, Debug, Default)]
pub struct History {
    // (token, occurrences in the output), ascending; a token of the prompt alone has zero.
    counts: Vec<(TokenId, u32)>,
}

impl History {
    /// Starts from the prompt, with an empty output.
    pub fn new(prompt: &[TokenId]) -> Self {
        let mut counts: Vec<(TokenId, u32)> = prompt.iter().map(|&token| (token, 0)).collect();
        counts.sort_unstable();
        counts.dedup();
        Self { counts }
    }

    /// Appends one token to the output.
    pub fn push(&mut self, token: TokenId) {
        match self.find(token) {
            Ok(at) => self.counts[at].1 += 1,
            Err(at) => self.counts.insert(at, (token, 1)),
        }
    }

    /// Sets the occurrences of a token in the output.
    pub fn set(&mut self, token: TokenId, output: u32) {
        match self.find(token) {
            Ok(at) => self.counts[at].1 = output,
            Err(at) => self.counts.insert(at, (token, output)),
        }
    }

    /// Distinct tokens of prompt and output, ascending, with their number of occurrences in the output.
    pub fn counts(&self) -> &[(TokenId, u32)] {
        &self.counts
    }

    /// Occurrences in the output.
    pub fn output_count(&self, token: TokenId) -> u32 {
        self.find(token).map_or(0, |at| self.counts[at].1)
    }

    fn find(&self, token: TokenId) -> Result<usize, usize> {
        self.counts.binary_search_by_key(&token, |&(token, _)| token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_ascend_and_tokens_of_the_prompt_alone_count_nothing() {
        let mut history = History::new(&[9, 2, 9, 4].map(TokenId));
        for token in [4, 7, 4, 1] {
            history.push(TokenId(token));
        }
        let expected = [(1, 1), (2, 0), (4, 2), (7, 1), (9, 0)];
        assert_eq!(history.counts(), expected.map(|(token, count)| (TokenId(token), count)));
        assert_eq!([4, 9, 8].map(|token| history.output_count(TokenId(token))), [2, 0, 0]);
    }
}
