//! Prefix reuse: full pages of resolved text, found again by a hash chain.
//!
//! ```text
//! root ── [page 0: tokens 0..ps] ── [page 1: tokens ps..2ps] ── ...      one node per page, a child per continuation
//! ```
//! Promises: a hash is only a hint, the tokens are compared; a cached page is full and never written; whoever holds a
//! node's page holds its ancestors' pages too, so a node nobody holds has no descendant that somebody holds, and every
//! node whose page only the cache owns can be evicted, leaves first, the least recently used leaf before others.

use std::collections::{BTreeSet, HashMap};

use crate::error::Result;
use crate::kv::pool::PagePool;
use crate::kv::state::{Checkpoint, CheckpointId, Checkpoints};
use crate::types::{PageId, TokenId};

/// A node of the cache: one full page of text after one particular prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    hash: u64,
    /// Next node of the same hash.
    next: Option<NodeId>,
    tokens: Box<[TokenId]>,
    page: PageId,
    children: u32,
    used: u64,
    draft_injected: bool,
    /// Where the target's state after the page's last token is kept.
    checkpoint: Option<CheckpointId>,
}

/// What a look-up found: one entry per page, in text order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The node.
    pub node: NodeId,
    /// Its page.
    pub page: PageId,
    /// Whether draft K/V of the whole page were injected.
    pub draft_injected: bool,
    /// The copy of the target's state after the page's last token, where one is kept.
    pub checkpoint: Option<CheckpointId>,
}

/// Outcome of [`PrefixCache::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The page is cached now, and the cache is one more owner of it.
    Now(NodeId),
    /// The same text is cached already, in another page.
    Elsewhere,
}

/// The cache.
#[derive(Debug)]
pub struct PrefixCache {
    page_size: usize,
    nodes: Vec<Option<Node>>,
    vacant: Vec<u32>,
    index: HashMap<u64, NodeId>,
    of_page: Vec<Option<NodeId>>,
    /// Leaves only the cache owns, least recently used first.
    leaves: BTreeSet<(u64, NodeId)>,
    /// Nodes only the cache owns, leaves or not.
    reclaimable: usize,
    clock: u64,
    checkpoints: Checkpoints,
    /// Every hash is the same.
    #[cfg(test)]
    collide: bool,
}

impl PrefixCache {
    pub(super) fn new(page_size: usize, num_pages: usize) -> Self {
        Self {
            page_size,
            nodes: Vec::new(),
            vacant: Vec::new(),
            index: HashMap::new(),
            of_page: vec![None; num_pages],
            leaves: BTreeSet::new(),
            reclaimable: 0,
            clock: 0,
            checkpoints: Checkpoints::default(),
            #[cfg(test)]
            collide: false,
        }
    }

    pub(super) fn keep_checkpoints(&mut self, total: usize) {
        self.checkpoints = Checkpoints::new(total);
    }

    /// State checkpoints in all, and how many of them are free.
    pub fn checkpoints(&self) -> (usize, usize) {
        (self.checkpoints.total(), self.checkpoints.num_free())
    }

    /// The checkpoint that `page` owns.
    pub fn checkpoint_of(&self, page: PageId) -> Option<CheckpointId> {
        self.node((*self.of_page.get(page.0 as usize)?)?).checkpoint
    }

    /// A checkpoint to write: a free one, or that of the page nobody has used for longest.
    pub(super) fn take_checkpoint(&mut self) -> Option<Checkpoint> {
        self.checkpoints.pop().or_else(|| {
            let node = self.checkpoints.steal()?;
            self.node_mut(node).checkpoint.take().map(Checkpoints::renewed)
        })
    }

    /// One that was not written, or that no page wants.
    pub(super) fn give_back(&mut self, checkpoint: Checkpoint) {
        self.checkpoints.give_back(checkpoint);
    }

    /// Gives a written checkpoint to a page that a request holds; to nobody when the page is not cached or has one already.
    pub(super) fn attach(&mut self, page: PageId, checkpoint: Checkpoint) -> bool {
        let node = self.of_page[page.0 as usize].map(|id| self.node_mut(id));
        match node.filter(|node| node.checkpoint.is_none()) {
            Some(node) => {
                node.checkpoint = Some(checkpoint.id());
                true
            }
            None => {
                self.give_back(checkpoint);
                false
            }
        }
    }

    /// Cached pages.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cached pages that no request holds.
    pub fn reclaimable(&self) -> usize {
        self.reclaimable
    }

    /// Whether the cache is an owner of `page`.
    pub fn holds(&self, page: PageId) -> bool {
        self.of_page.get(page.0 as usize).is_some_and(Option::is_some)
    }

    /// The text of `page` after its prefix, when it is cached.
    pub fn text_of(&self, page: PageId) -> Option<Vec<TokenId>> {
        let mut at = (*self.of_page.get(page.0 as usize)?)?;
        let mut pages = vec![&*self.node(at).tokens];
        while let Some(parent) = self.node(at).parent {
            pages.push(&self.node(parent).tokens);
            at = parent;
        }
        Some(pages.into_iter().rev().flatten().copied().collect())
    }

    /// Finds the longest cached prefix of `tokens`, at most `max_pages` pages. Nothing changes.
    pub fn find(&self, tokens: &[TokenId], max_pages: usize, hits: &mut Vec<Hit>) {
        hits.clear();
        let mut parent = None;
        for page_tokens in tokens.chunks_exact(self.page_size).take(max_pages) {
            let Some(id) = self.child(parent, page_tokens) else {
                break;
            };
            let node = self.node(id);
            hits.push(Hit {
                node: id,
                page: node.page,
                draft_injected: node.draft_injected,
                checkpoint: node.checkpoint,
            });
            parent = Some(id);
        }
    }

    /// Caches a full page whose text is `tokens`, following `parent`'s text. With `adopt` it takes the place of a page of the same text that
    /// nobody uses: the row that brings it could not use that one, and goes on from here.
    pub(super) fn insert(
        &mut self,
        parent: Option<NodeId>,
        tokens: &[TokenId],
        page: PageId,
        draft_injected: bool,
        adopt: bool,
        pool: &mut PagePool,
    ) -> Result<Inserted> {
        debug_assert_eq!(tokens.len(), self.page_size);
        if let Some(id) = self.child(parent, tokens) {
            return self.replace(id, page, draft_injected, adopt, pool);
        }
        pool.retain(page)?;
        let hash = self.hash(parent, tokens);
        let id = NodeId(self.vacant.pop().unwrap_or(self.nodes.len() as u32));
        let node = Node {
            parent,
            hash,
            next: self.index.insert(hash, id),
            tokens: tokens.into(),
            page,
            children: 0,
            used: 0, // somebody holds it; counts from when the last one lets go
            draft_injected,
            checkpoint: None,
        };
        if id.0 as usize == self.nodes.len() {
            self.nodes.push(Some(node));
        } else {
            self.nodes[id.0 as usize] = Some(node);
        }
        self.of_page[page.0 as usize] = Some(id);
        if let Some(parent) = parent {
            let node = self.node_mut(parent);
            node.children += 1;
            // A row holds the parent, so it is not among the evictable leaves.
            debug_assert!(!self.leaves.contains(&(self.node(parent).used, parent)));
        }
        Ok(Inserted::Now(id))
    }

    /// The same text in a page that is worth more: one with draft K/V takes the place of one without, if nobody uses that.
    fn replace(
        &mut self,
        id: NodeId,
        page: PageId,
        draft_injected: bool,
        adopt: bool,
        pool: &mut PagePool,
    ) -> Result<Inserted> {
        let Node {
            page: old,
            used,
            draft_injected: had,
            ..
        } = *self.node(id);
        let better = (draft_injected && (adopt || !had)) || (adopt && !had);
        if !better || old == page || pool.owners(old) != 1 {
            return Ok(Inserted::Elsewhere);
        }
        pool.retain(page)?;
        // A row holds the new page, so the node is neither reclaimable nor, if it is a leaf, evictable.
        self.reclaimable -= 1;
        self.leaves.remove(&(used, id));
        self.checkpoints.busy(used, id);
        self.of_page[old.0 as usize] = None;
        self.of_page[page.0 as usize] = Some(id);
        let node = self.node_mut(id);
        (node.page, node.draft_injected) = (page, draft_injected);
        pool.release(old)?;
        Ok(Inserted::Now(id))
    }

    /// A request became an owner of a cached page.
    pub(super) fn retained(&mut self, page: PageId, owners: u32) {
        let Some(id) = self.of_page[page.0 as usize] else {
            return;
        };
        if owners == 2 {
            let used = self.node(id).used;
            self.reclaimable -= 1;
            self.leaves.remove(&(used, id));
            self.checkpoints.busy(used, id);
        }
    }

    /// An owner of a page left.
    pub(super) fn released(&mut self, page: PageId, owners: u32) {
        let Some(id) = self.of_page[page.0 as usize] else {
            return;
        };
        if owners == 1 {
            self.reclaimable += 1;
            self.clock += 1;
            let used = self.clock;
            let node = self.node_mut(id);
            node.used = used;
            if node.checkpoint.is_some() {
                self.checkpoints.idles(used, id);
            }
            self.offer(id);
        }
    }

    /// Frees up to `count` pages nobody else holds, least recently used leaves first; returns how many.
    pub(super) fn evict(&mut self, count: usize, pool: &mut PagePool) -> Result<usize> {
        let mut freed = 0;
        while freed < count {
            let Some((_, id)) = self.leaves.pop_first() else {
                break;
            };
            self.remove(id, pool)?;
            freed += 1;
        }
        Ok(freed)
    }

    fn remove(&mut self, id: NodeId, pool: &mut PagePool) -> Result<()> {
        let Some(node) = self.nodes[id.0 as usize].take() else {
            return Ok(());
        };
        self.vacant.push(id.0);
        self.of_page[node.page.0 as usize] = None;
        self.reclaimable -= 1;
        if let Some(checkpoint) = node.checkpoint {
            self.checkpoints.busy(node.used, id);
            self.checkpoints.released(checkpoint);
        }
        self.unlink(node.hash, id, node.next);
        if let Some(parent) = node.parent {
            self.node_mut(parent).children -= 1;
            if pool.owners(self.node(parent).page) == 1 {
                self.offer(parent);
            }
        }
        pool.release(node.page).map(|_| ())
    }

    fn unlink(&mut self, hash: u64, id: NodeId, next: Option<NodeId>) {
        let Some(&first) = self.index.get(&hash) else {
            return;
        };
        if first == id {
            match next {
                Some(next) => self.index.insert(hash, next),
                None => self.index.remove(&hash),
            };
            return;
        }
        let mut at = first;
        while let Some(after) = self.node(at).next {
            if after == id {
                self.node_mut(at).next = next;
                return;
            }
            at = after;
        }
    }

    fn offer(&mut self, id: NodeId) {
        let node = self.node(id);
        if node.children == 0 {
            let entry = (node.used, id);
            self.leaves.insert(entry);
        }
    }

    fn child(&self, parent: Option<NodeId>, tokens: &[TokenId]) -> Option<NodeId> {
        let mut at = self.index.get(&self.hash(parent, tokens)).copied();
        while let Some(id) = at {
            let node = self.node(id);
            if node.parent == parent && *node.tokens == *tokens {
                return Some(id);
            }
            at = node.next;
        }
        None
    }

    fn hash(&self, parent: Option<NodeId>, tokens: &[TokenId]) -> u64 {
        #[cfg(test)]
        if self.collide {
            return 0;
        }
        let mut hash = parent.map_or(0x9E37_79B9_7F4A_7C15, |id| self.node(id).hash);
        for token in tokens {
            hash = (hash ^ u64::from(token.0)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
            hash ^= hash >> 32;
        }
        hash
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize]
            .as_ref()
            .expect("a node id held by a row, a child or the index is alive")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0 as usize]
            .as_mut()
            .expect("a node id held by a row, a child or the index is alive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn pages_that_differ_in_one_token_have_different_hashes() {
        let cache = PrefixCache::new(16, 1);
        let mut hashes = std::collections::HashSet::new();
        for place in 0..16 {
            for id in 1..500 {
                let mut text = tokens(&[0; 16]);
                text[place] = TokenId(id);
                hashes.insert(cache.hash(None, &text));
            }
        }
        assert_eq!(hashes.len(), 16 * 499);
    }

    #[test]
    fn texts_with_the_same_hash_are_told_apart_and_evicted_one_by_one() {
        let mut pool = PagePool::new(4).unwrap();
        let mut cache = PrefixCache::new(2, 4);
        cache.collide = true;
        let pages: Vec<PageId> = (0..4).map(|_| pool.alloc().unwrap()).collect();
        let mut add = |cache: &mut PrefixCache, parent, text: &[u32], page| match cache
            .insert(parent, &tokens(text), page, true, false, &mut pool)
            .unwrap()
        {
            Inserted::Now(node) => node,
            Inserted::Elsewhere => panic!("{text:?} is not cached yet"),
        };
        let first = add(&mut cache, None, &[1, 2], pages[0]);
        let other = add(&mut cache, None, &[3, 4], pages[1]);
        add(&mut cache, Some(first), &[3, 4], pages[2]);
        add(&mut cache, Some(other), &[1, 2], pages[3]);
        let find = |cache: &PrefixCache, text: &[u32]| -> Vec<PageId> {
            let mut hits = Vec::new();
            cache.find(&tokens(text), 9, &mut hits);
            hits.iter().map(|hit| hit.page).collect()
        };
        assert_eq!(find(&cache, &[1, 2, 3, 4]), [pages[0], pages[2]]);
        assert_eq!(find(&cache, &[3, 4, 1, 2]), [pages[1], pages[3]]);
        assert_eq!(find(&cache, &[1, 2, 1, 2]), [pages[0]]);
        for &page in pages.iter().rev() {
            let owners = pool.release(page).unwrap();
            cache.released(page, owners);
        }
        // Leaves first, the one let go of longest ago before the other.
        for (gone, left) in [(3, vec![pages[0], pages[2]]), (2, vec![pages[0]])] {
            assert_eq!(cache.evict(1, &mut pool), Ok(1));
            assert_eq!(pool.owners(pages[gone]), 0);
            assert_eq!(find(&cache, &[1, 2, 3, 4]), left);
        }
        assert_eq!(cache.evict(9, &mut pool), Ok(2));
        assert!(cache.is_empty() && pool.num_free() == 4);
    }

    #[test]
    fn texts_with_the_same_hash_can_be_evicted_in_any_order() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut pool = PagePool::new(3).unwrap();
            let mut cache = PrefixCache::new(2, 3);
            cache.collide = true;
            let texts = [[1, 2], [3, 4], [5, 6]].map(|ids| tokens(&ids));
            for text in &texts {
                let page = pool.alloc().unwrap();
                assert!(matches!(
                    cache.insert(None, text, page, true, false, &mut pool),
                    Ok(Inserted::Now(_))
                ));
            }
            assert!(!cache.is_empty());
            for page in order.map(PageId) {
                let owners = pool.release(page).unwrap();
                cache.released(page, owners);
            }
            let mut left = [true; 3];
            for gone in order {
                assert_eq!(cache.evict(1, &mut pool), Ok(1));
                left[gone as usize] = false;
                let found = texts.each_ref().map(|text| {
                    let mut hits = Vec::new();
                    cache.find(text, 1, &mut hits);
                    !hits.is_empty()
                });
                assert_eq!(found, left, "{order:?}");
            }
        }
    }
}
