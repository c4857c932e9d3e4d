use dflash_host_check as _;
use dflash_rs::device::cuda::params::{CompactKvParams, KvInjectParams};

use super::numbers::{Numbers, Pages, address, address_mut, share};

unsafe extern "C" {
    fn dflash_host_kv_inject(p: *const KvInjectParams, head_dim: i32);
    fn dflash_host_compact_kv(p: *const CompactKvParams);
    fn dflash_emulated_kv_inject(p: *const KvInjectParams, head_dim: i32);
    fn dflash_emulated_compact_kv(p: *const CompactKvParams);
}

const POISON: u16 = 0xdede;

fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

fn wide(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

fn values(numbers: &mut Numbers, n: usize) -> Vec<u16> {
    (0..n).map(|_| bf16((numbers.unit() * 4.0 - 2.0) as f32)).collect()
}

/// One cache per layer, poisoned.
fn caches(layers: usize, len: usize) -> Vec<Vec<u16>> {
    vec![vec![POISON; len]; layers]
}

fn addresses(caches: &mut [Vec<u16>]) -> Vec<u64> {
    caches.iter_mut().map(|cache| address_mut(cache)).collect()
}

#[test]
fn injection_stores_normed_and_rotated_keys_of_committed_rows_and_nothing_else() {
    inject(&mut Numbers(8), 20_000, dflash_host_kv_inject);
    inject(&mut Numbers(108), 300, dflash_emulated_kv_inject);
}

fn inject(numbers: &mut Numbers, most: usize, kernel: unsafe extern "C" fn(*const KvInjectParams, i32)) {
    let mut vectors = 0;
    while vectors < share(most) {
        let dim = numbers.pick(&[64usize, 128, 256]);
        let rotary = if numbers.chance(0.7) {
            dim
        } else {
            numbers.pick(&[16, 32, dim / 2])
        };
        let (rows, layers, heads) = (numbers.below(6), numbers.within(1, 3), numbers.within(1, 4));
        let slots_len = rows + numbers.below(8);
        let source_rows = rows + 3;
        let (pad_row, pad_slot) = (8 * numbers.below(3), 8 * numbers.below(3));
        let split = numbers.chance(0.5); // all K of a layer, then all V; or layers of K, then layers of V
        let per_layer = heads * dim;
        let (layer_stride, v_offset) = if split {
            (2 * per_layer, per_layer)
        } else {
            (per_layer, layers * per_layer)
        };
        let row_stride = 2 * layers * per_layer + pad_row;
        let kv = values(numbers, source_rows * row_stride);
        let k_norm = values(numbers, layers * dim);
        let positions: Vec<i64> = (0..rows).map(|_| numbers.below(50) as i64).collect();
        let cos_sin: Vec<f32> = (0..50)
            .flat_map(|p| {
                let angle = move |i: usize| p as f64 * 100f64.powf(-2.0 * i as f64 / rotary as f64);
                let half = rotary / 2;
                (0..half)
                    .map(move |i| angle(i).cos() as f32)
                    .chain((0..half).map(move |i| angle(i).sin() as f32))
            })
            .collect();
        let order = numbers.shuffled(slots_len);
        let slots: Vec<i64> = (0..rows)
            .map(|m| if numbers.chance(0.3) { -1 } else { order[m] as i64 })
            .collect();
        let picked = numbers.chance(0.5);
        let from: Vec<i64> = (0..rows)
            .map(|_| {
                if numbers.chance(0.1) {
                    -1
                } else {
                    numbers.below(source_rows) as i64
                }
            })
            .collect();
        let slot_stride = heads * dim + pad_slot;
        let (mut k_caches, mut v_caches) = (
            caches(layers, slots_len * slot_stride),
            caches(layers, slots_len * slot_stride),
        );
        let (k_addresses, v_addresses) = (addresses(&mut k_caches), addresses(&mut v_caches));
        let eps = 1e-6;
        let params = KvInjectParams {
            kv: address(&kv),
            k_norm: address(&k_norm),
            cos_sin: address(&cos_sin),
            rows: if picked { address(&from) } else { 0 },
            positions: address(&positions),
            slots: address(&slots),
            k_caches: address(&k_addresses),
            v_caches: address(&v_addresses),
            row_stride: row_stride as i64,
            layer_stride: layer_stride as i64,
            v_offset: v_offset as i64,
            slot_stride: slot_stride as i64,
            head_stride: dim as i64,
            max_rows: rows as i32,
            num_layers: layers as i32,
            num_heads: heads as i32,
            rotary_dim: rotary as i32,
            eps,
            reserved: 0,
        };
        // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
        unsafe { kernel(&raw const params, dim as i32) };
        let (mut k_expected, mut v_expected) = (vec![], vec![]);
        for layer in 0..layers {
            let mut k_cache: Vec<Option<f64>> = vec![None; slots_len * slot_stride];
            let mut v_cache = k_cache.clone();
            for m in 0..rows {
                let source = if picked { from[m] } else { m as i64 };
                if slots[m] < 0 || source < 0 {
                    continue;
                }
                for head in 0..heads {
                    vectors += 1;
                    let at = source as usize * row_stride + layer * layer_stride + head * dim;
                    let to = slots[m] as usize * slot_stride + head * dim;
                    let k: Vec<f64> = kv[at..at + dim].iter().map(|&x| wide(x)).collect();
                    let mean = k.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                    let normed: Vec<f64> = (0..dim)
                        .map(|d| k[d] / (mean + f64::from(eps)).sqrt() * wide(k_norm[layer * dim + d]))
                        .collect();
                    let turn = |i: usize| f64::from(cos_sin[positions[m] as usize * rotary + i]);
                    let half = rotary / 2;
                    for d in 0..dim {
                        let rotated = if d < half {
                            normed[d] * turn(d) - normed[d + half] * turn(half + d)
                        } else if d < rotary {
                            normed[d] * turn(d - half) + normed[d - half] * turn(d)
                        } else {
                            normed[d]
                        };
                        k_cache[to + d] = Some(rotated);
                        v_cache[to + d] = Some(wide(kv[at + v_offset + d]));
                    }
                }
            }
            k_expected.push(k_cache);
            v_expected.push(v_cache);
        }
        for (got, expected) in k_caches.iter().zip(&k_expected).chain(v_caches.iter().zip(&v_expected)) {
            for (&got, expected) in got.iter().zip(expected) {
                match expected {
                    None => assert_eq!(got, POISON),
                    Some(x) => assert!((wide(got) - x).abs() <= x.abs() / 250.0 + 1e-5, "{} {x}", wide(got)),
                }
            }
        }
        vectors += 1;
    }
}

#[test]
fn compaction_moves_the_accepted_path_and_nothing_else() {
    compact(&mut Numbers(9), 100_000, dflash_host_compact_kv);
    compact(&mut Numbers(109), 2_000, dflash_emulated_compact_kv);
}

fn compact(numbers: &mut Numbers, most: usize, kernel: unsafe extern "C" fn(*const CompactKvParams)) {
    let mut moved = 0;
    while moved < share(most) {
        let (requests, layers, heads) = (numbers.below(4), numbers.within(1, 2), numbers.within(1, 3));
        let dim = numbers.pick(&[8usize, 64, 128]);
        // The table may end before a path does: what would lie behind it stays where it is.
        let keys = numbers.pick(&[60, 60, 30]);
        let pages = Pages::new(numbers, requests, keys);
        let num_slots = pages.table.len() * pages.page_size;
        let (slot_stride, head_stride) = (heads * dim + 8, dim);
        let stride = numbers.within(1, 24);
        let context: Vec<i32> = (0..requests).map(|_| numbers.below(20) as i32).collect();
        let mut path = vec![-1i32; requests * stride];
        for row in path.chunks_mut(stride) {
            let mut node = 0;
            for entry in row.iter_mut().take(numbers.within(0, stride)) {
                *entry = node;
                node += numbers.pick(&[1, 1, 1, 2, 4]);
                if node >= 40 {
                    break;
                }
            }
        }
        let filled = |numbers: &mut Numbers| -> Vec<Vec<u16>> {
            (0..layers)
                .map(|_| (0..num_slots * slot_stride).map(|_| numbers.next() as u16).collect())
                .collect()
        };
        let (mut k_caches, mut v_caches) = (filled(numbers), filled(numbers));
        let (k_before, v_before) = (k_caches.clone(), v_caches.clone());
        let (k_addresses, v_addresses) = (addresses(&mut k_caches), addresses(&mut v_caches));
        let params = CompactKvParams {
            path: address(&path),
            context_lens: address(&context),
            k_caches: address(&k_addresses),
            v_caches: address(&v_addresses),
            table: pages.params(),
            path_stride: stride as i64,
            slot_stride: slot_stride as i64,
            head_stride: head_stride as i64,
            num_requests: requests as i32,
            num_layers: layers as i32,
            num_heads: heads as i32,
            head_dim: dim as i32,
        };
        // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
        unsafe { kernel(&raw const params) };
        for (got, before) in k_caches.iter().zip(&k_before).chain(v_caches.iter().zip(&v_before)) {
            let mut expected = before.clone();
            for r in 0..requests {
                for (k, &node) in path[r * stride..(r + 1) * stride].iter().enumerate() {
                    if node < 0 {
                        break;
                    }
                    let from = pages.slot(r, context[r] as usize + node as usize);
                    let to = pages.slot(r, context[r] as usize + k);
                    if from < 0 || to < 0 {
                        continue;
                    }
                    let (from, to) = (from as usize * slot_stride, to as usize * slot_stride);
                    expected[to..to + heads * dim].copy_from_slice(&before[from..from + heads * dim]);
                    moved += heads;
                }
            }
            assert!(*got == expected);
        }
        moved += 1;
    }
}
