//! Newtypes shared by every room. They exist so that a page cannot be passed where a slot is meant.

/// A vocabulary id. Always below the target's vocabulary size once it is inside the core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct TokenId(pub u32);

/// A request, unique for the life of an engine and never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct RequestId(pub u64);

/// A page of the KV pool. Page `p` covers KV slots `p * page_size .. (p + 1) * page_size`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageId(pub u32);

/// A row of the request table (which running request), reused after its request has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct SlotId(pub u32);
