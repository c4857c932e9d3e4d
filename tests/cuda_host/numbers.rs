//! Reproducible test numbers, and batches made of them.

use dflash_rs::device::cuda::params::PageTable;

/// How many of `most` random cases a test looks at: all of them, or the share that DFLASH_CASES asks for, such as 0.02; at least one.
pub fn share(most: usize) -> usize {
    let share =
        std::env::var("DFLASH_CASES").map_or(1.0, |share| share.parse::<f64>().expect("DFLASH_CASES: a number"));
    ((most as f64 * share) as usize).max(1)
}

pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// From `low` to `high`, both included.
    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A permutation of `0..n`.
    pub fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// The address of an array; 0 stands for none.
pub fn address<T>(array: &[T]) -> u64 {
    array.as_ptr() as u64
}

pub fn address_mut<T>(array: &mut [T]) -> u64 {
    array.as_mut_ptr() as u64
}

/// Pages of a few requests, in rows of a table that are not in request order.
pub struct Pages {
    pub table: Vec<i32>,
    pub row_ids: Vec<i32>,
    pub width: usize,
    pub page_size: usize,
}

impl Pages {
    pub fn new(numbers: &mut Numbers, requests: usize, keys: usize) -> Self {
        let page_size = numbers.pick(&[1, 3, 16, 64]);
        let width = keys.div_ceil(page_size);
        let rows = requests + numbers.below(3);
        Self {
            table: numbers.shuffled(rows * width).into_iter().map(|p| p as i32).collect(),
            row_ids: numbers.shuffled(rows)[..requests].iter().map(|&r| r as i32).collect(),
            width,
            page_size,
        }
    }

    pub fn slot(&self, request: usize, key: usize) -> i64 {
        if key / self.page_size >= self.width {
            return -1;
        }
        let page = self.table[self.row_ids[request] as usize * self.width + key / self.page_size];
        i64::from(page) * self.page_size as i64 + (key % self.page_size) as i64
    }

    pub fn params(&self) -> PageTable {
        PageTable {
            pages: address(&self.table),
            row_ids: address(&self.row_ids),
            width: self.width as i32,
            page_size: self.page_size as i32,
        }
    }
}

/// Prefix sums.
pub fn starts(lens: &[usize]) -> Vec<i32> {
    let mut starts = vec![0];
    for len in lens {
        starts.push(starts[starts.len() - 1] + *len as i32);
    }
    starts
}
