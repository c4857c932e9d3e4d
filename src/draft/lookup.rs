//! Look-up: what followed the last time a text ended as it does now. No model, no weights.
//!
//! ```text
//!   ... the cat sat on the mat. The cat sat on        the longest ending that occurred before: " cat sat on", 3 tokens
//!        ─────────── ▲                                its latest occurrence is followed by "the mat ."
//!                    drafts
//! ```
//! Promises:
//! - The ending is the longest one of any length; of several occurrences that ended alike the latest is copied (see [`Lookup::extend`]).
//! - A token costs O(1) amortised to read, whatever the text; a draft costs O(1).
//! - At most two states and three edges a token: about 80 bytes, never more than 192 with the room that vectors grow into. They go with
//!   their request.
//! - What is proposed depends on the request's own text alone.
//!
//! The structure is a suffix automaton (Blumer et al. 1985): a state stands for the endings that occur at the same places, the suffix link
//! of the state of the whole text is the state of its longest ending that occurred before.
//!
//! How likely a draft is hangs on how long the ending was, and on whether everything that ever followed it was the same token: learnt by
//! [`LookupRates`] from every guess, drafted or not, as soon as it is known how the text went on.

use crate::types::TokenId;

const NONE: u32 = u32::MAX;
/// States of one text that learn of a new occurrence, longest first. Beyond that an older occurrence is copied, which is as good an ending.
const RENEWED: usize = 32;
/// Matches at least so long count alike.
const LONGEST: usize = 31;
/// Guesses over which what became of them is remembered, about.
const MEMORY: f64 = 200.0;
/// Guesses that the assumption at the start is worth.
const PRIOR: f64 = 6.0;

/// Endings that occur at the same places.
#[derive(Clone, Copy, Debug)]
struct State {
    /// Tokens of the longest of them.
    len: u32,
    /// The state of the longest ending of theirs that occurs elsewhere, too.
    link: u32,
    /// Index of the last token of an occurrence: the latest that was renewed.
    end: u32,
    /// Of its edges, the one added last.
    edge: u32,
}

/// What follows a state.
#[derive(Clone, Copy, Debug)]
struct Edge {
    from: u32,
    token: u32,
    to: u32,
    /// Another edge of the same state.
    next: u32,
}

/// A draft, and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The token.
    pub token: TokenId,
    /// Tokens before it that are the same as before its model: those of the text, and drafts.
    pub matched: u32,
    /// Whether nothing else ever followed these tokens.
    pub unanimous: bool,
}

/// The index of one text that grows. The text itself stays with whoever owns it.
#[derive(Clone, Debug)]
pub struct Lookup {
    states: Vec<State>,
    edges: Vec<Edge>,
    /// Open addressing by (state, token): indices of edges.
    table: Vec<u32>,
    /// The state of the whole text.
    last: u32,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            states: vec![State {
                len: 0,
                link: NONE,
                end: NONE,
                edge: NONE,
            }],
            edges: Vec::new(),
            table: vec![NONE; 16],
            last: 0,
        }
    }
}

impl Lookup {
    /// Of an empty text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens read.
    pub fn len(&self) -> usize {
        self.states[self.last as usize].len as usize
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        self.states.capacity() * size_of::<State>()
            + self.edges.capacity() * size_of::<Edge>()
            + self.table.capacity() * size_of::<u32>()
    }

    /// Reads on: `text` begins with the tokens that were read before. An ending that recurs is copied from its latest occurrence, unless
    /// more than 31 longer endings of the same place recurred then.
    pub fn extend(&mut self, text: &[TokenId]) {
        for &token in &text[self.len().min(text.len())..] {
            self.push(token.0);
        }
    }

    fn push(&mut self, token: u32) {
        let place = self.states[self.last as usize].len;
        // What ended at the last token is in the past now.
        let mut renewed = self.last;
        for _ in 0..RENEWED {
            if renewed == 0 {
                break;
            }
            self.states[renewed as usize].end = place - 1;
            renewed = self.states[renewed as usize].link;
        }
        let current = self.add_state(State {
            len: place + 1,
            link: 0,
            end: place,
            edge: NONE,
        });
        let mut state = self.last;
        self.last = current;
        let met = loop {
            match self.edge(state, token) {
                Some(edge) => break edge,
                None => self.add_edge(state, token, current),
            }
            state = self.states[state as usize].link;
            if state == NONE {
                return;
            }
        };
        let known = self.edges[met].to;
        let wanted = self.states[state as usize].len + 1;
        if self.states[known as usize].len == wanted {
            self.states[current as usize].link = known;
            return;
        }
        // Only the shorter of its endings occur here, too: they become a state of their own.
        let split = self.add_state(State {
            len: wanted,
            edge: NONE,
            ..self.states[known as usize]
        });
        let mut copied = self.states[known as usize].edge;
        while copied != NONE {
            let Edge { token, to, next, .. } = self.edges[copied as usize];
            self.add_edge(split, token, to);
            copied = next;
        }
        self.states[known as usize].link = split;
        self.states[current as usize].link = split;
        while state != NONE {
            match self.edge(state, token) {
                Some(edge) if self.edges[edge].to == known => self.edges[edge].to = split,
                _ => break,
            }
            state = self.states[state as usize].link;
        }
    }

    /// Tokens of the longest ending of the text that occurred before, 0 without any.
    pub fn matched(&self) -> usize {
        match self.states[self.last as usize].link {
            NONE => 0,
            before => self.states[before as usize].len as usize,
        }
    }

    /// Up to `count` drafts of what follows `text`, all of which has been read, into `guesses`; none without an ending that occurred before.
    /// Where the text ends, the copy goes on through its own beginning: a loop shorter than that is drafted as a whole.
    pub fn propose(&self, text: &[TokenId], count: usize, guesses: &mut Vec<Guess>) {
        guesses.clear();
        let (matched, mut state) = (self.matched(), self.states[self.last as usize].link);
        if matched == 0 || text.len() != self.len() {
            return;
        }
        let first = self.states[state as usize].end as usize + 1;
        for at in 0..count {
            let from = first + at;
            let token = match from.checked_sub(text.len()) {
                None => text[from],
                Some(beyond) => guesses[beyond].token,
            };
            let others = state != NONE
                && self.states[state as usize].edge != NONE
                && self.edges[self.states[state as usize].edge as usize].next != NONE;
            guesses.push(Guess {
                token,
                matched: (matched + at) as u32,
                unanimous: !others,
            });
            if state != NONE {
                state = self.edge(state, token.0).map_or(NONE, |edge| self.edges[edge].to);
            }
        }
    }

    fn add_state(&mut self, state: State) -> u32 {
        self.states.push(state);
        self.states.len() as u32 - 1
    }

    fn add_edge(&mut self, from: u32, token: u32, to: u32) {
        if (self.edges.len() + 1) * 4 > self.table.len() * 3 {
            self.table = vec![NONE; self.table.len() * 2];
            for edge in 0..self.edges.len() as u32 {
                self.enter(edge);
            }
        }
        let number = self.edges.len() as u32;
        let next = std::mem::replace(&mut self.states[from as usize].edge, number);
        self.edges.push(Edge { from, token, to, next });
        self.enter(number);
    }

    fn enter(&mut self, edge: u32) {
        let Edge { from, token, .. } = self.edges[edge as usize];
        let mut at = self.place(from, token);
        while self.table[at] != NONE {
            at = (at + 1) % self.table.len();
        }
        self.table[at] = edge;
    }

    fn edge(&self, from: u32, token: u32) -> Option<usize> {
        let mut at = self.place(from, token);
        loop {
            let edge = self.table[at];
            if edge == NONE {
                return None;
            }
            let known = &self.edges[edge as usize];
            if known.from == from && known.token == token {
                return Some(edge as usize);
            }
            at = (at + 1) % self.table.len();
        }
    }

    /// Where to look first. The table's size is a power of two: the best bits of the product are its upper ones.
    fn place(&self, from: u32, token: u32) -> usize {
        let key = (u64::from(from) << 32 | u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (key ^ key >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed >> 32) as usize & (self.table.len() - 1)
    }
}

/// How often guesses were right, by how much of the text before them matched.
#[derive(Clone, Debug)]
pub struct LookupRates {
    // Fading, by `place`: guesses that the text went past, and those that were right.
    reached: [f64; 2 * (LONGEST + 1)],
    accepted: [f64; 2 * (LONGEST + 1)],
}

impl Default for LookupRates {
    fn default() -> Self {
        Self {
            reached: [0.0; 2 * (LONGEST + 1)],
            accepted: [0.0; 2 * (LONGEST + 1)],
        }
    }
}

impl LookupRates {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chance that a draft is accepted when all before it were.
    pub fn chance(&self, guess: &Guess) -> f32 {
        let at = place(guess);
        let matched = f64::from(guess.matched.min(LONGEST as u32));
        // Near what a chat model's answers said of code, mathematics and prose alike (1: 0.25, 2: 0.51, 4: 0.68, 8: 0.86), and half of it where
        // something else followed, too (1: 0.14, 2: 0.28, 4: 0.31, 8: 0.41).
        let assumed = matched / (matched + 2.0) * if guess.unanimous { 1.0 } else { 0.5 };
        ((self.accepted[at] + PRIOR * assumed) / (self.reached[at] + PRIOR)) as f32
    }

    /// Books what became of a request's guesses, now that it is known how its text goes on: those up to the first that was wrong, as far as the
    /// text goes. Whether they were drafted does not matter.
    pub fn record(&mut self, guesses: &[Guess], text: impl Iterator<Item = TokenId>) {
        let fade = 1.0 - 1.0 / MEMORY;
        for (guess, token) in guesses.iter().zip(text) {
            let (place, right) = (place(guess), guess.token == token);
            self.reached[place] = self.reached[place] * fade + 1.0;
            self.accepted[place] = self.accepted[place] * fade + f64::from(u8::from(right));
            if !right {
                return;
            }
        }
    }
}

fn place(guess: &Guess) -> usize {
    2 * (guess.matched as usize).min(LONGEST) + usize::from(guess.unanimous)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tokens: &[u32]) -> (Vec<TokenId>, Lookup) {
        let text: Vec<TokenId> = tokens.iter().map(|&token| TokenId(token)).collect();
        let mut lookup = Lookup::new();
        assert!(lookup.is_empty());
        lookup.extend(&text);
        assert_eq!((lookup.len(), lookup.is_empty()), (text.len(), text.is_empty()));
        (text, lookup)
    }

    #[test]
    fn its_bytes_are_those_of_states_edges_and_the_table() {
        // Every token once: a state each and one for nothing, two edges each but one, three quarters of the table's places at most.
        let (_, lookup) = read(&(0..1023).collect::<Vec<_>>());
        assert_eq!(
            (lookup.states.len(), lookup.edges.len(), lookup.table.len()),
            (1024, 2045, 4096)
        );
        let (states, edges) = (lookup.states.capacity(), lookup.edges.capacity());
        assert_eq!(lookup.bytes(), states * 16 + edges * 16 + 4096 * 4);
    }

    #[test]
    fn a_draft_is_unanimous_as_long_as_nothing_else_followed_all_that_is_before_it() {
        let (text, lookup) = read(&[1, 2, 3, 7, 1, 2, 3, 8, 1]);
        let mut guesses = Vec::new();
        lookup.propose(&text, 4, &mut guesses);
        let found: Vec<_> = guesses.iter().map(|g| (g.token.0, g.matched, g.unanimous)).collect();
        assert_eq!(found, [(2, 1, true), (3, 2, true), (8, 3, false), (1, 4, true)]);
    }

    #[test]
    fn rates_are_learnt_by_what_matched_and_forgotten() {
        let guess = |matched, unanimous| Guess {
            token: TokenId(0),
            matched,
            unanimous,
        };
        let kinds: Vec<Guess> = (0..40).flat_map(|m| [guess(m, false), guess(m, true)]).collect();
        for of in &kinds {
            let mut rates = LookupRates::new();
            rates.record(&[*of], [TokenId(1)].into_iter());
            for other in &kinds {
                let same = other.unanimous == of.unanimous && other.matched.min(31) == of.matched.min(31);
                let less = rates.chance(other) < LookupRates::new().chance(other);
                // Nothing that matched has no chance as it is.
                assert_eq!(less, same && other.matched > 0, "{of:?} {other:?}");
            }
        }
        let (one, mut rates) = ([guess(3, true)], LookupRates::new());
        (0..1000).for_each(|_| rates.record(&one, [TokenId(0)].into_iter()));
        assert!(rates.chance(&one[0]) > 0.98);
        (0..400).for_each(|_| rates.record(&one, [TokenId(1)].into_iter()));
        assert!(rates.chance(&one[0]) < 0.16, "{}", rates.chance(&one[0]));
    }

    #[test]
    fn guesses_count_up_to_the_first_that_is_wrong_and_as_far_as_the_text_goes() {
        let guesses: Vec<Guess> = (1..=5)
            .map(|matched| Guess {
                token: TokenId(matched),
                matched,
                unanimous: true,
            })
            .collect();
        let moved = |text: &[u32]| -> Vec<i32> {
            let mut rates = LookupRates::new();
            rates.record(&guesses, text.iter().map(|&token| TokenId(token)));
            let change = |guess| rates.chance(guess) - LookupRates::new().chance(guess);
            guesses
                .iter()
                .map(|guess| change(guess).total_cmp(&0.0) as i32)
                .collect()
        };
        assert_eq!(moved(&[]), [0, 0, 0, 0, 0]);
        assert_eq!(moved(&[1, 2]), [1, 1, 0, 0, 0]);
        assert_eq!(moved(&[1, 2, 9, 4]), [1, 1, -1, 0, 0]);
        assert_eq!(moved(&[9]), [-1, 0, 0, 0, 0]);
        assert_eq!(moved(&[1, 2, 3, 4, 5, 6]), [1, 1, 1, 1, 1]);
    }
}
