use dflash_host_check as _;

use dflash_rs::device::cuda::params::PageTable;

use super::numbers::{Numbers, address, share};
use crate::verify::math::{exp, order_key, weight};

unsafe extern "C" {
    fn dflash_host_weights(x: *const f32, count: u32, exps: *mut f32, weights: *mut u64, keys: *mut u32);
    fn dflash_host_bf16(x: *const f32, count: u32, out: *mut u16);
    fn dflash_host_elements(at: *const u16, out: *mut f32);
    fn dflash_host_slots(table: *const PageTable, request: i32, keys: *const i32, count: u32, out: *mut i64);
    fn dflash_host_requests(starts: *const i32, requests: i32, tokens: *const i32, count: u32, out: *mut i32);
}

#[test]
fn exponentials_and_weights_have_the_bits_of_the_reference() {
    let mut numbers = Numbers(15);
    let mut x: Vec<f32> = (0..share(400_000)).map(|_| (numbers.unit() * -45.0) as f32).collect();
    // Any size down to the smallest, both zeros, where weights vanish and where exp stops falling.
    x.extend((0..share(100_000)).map(|_| f32::from_bits(0x8000_0000 | numbers.within(0, 0x4234_0000) as u32)));
    x.extend([0.0, -0.0, -1e30, f32::MIN, f32::NEG_INFINITY]);
    for edge in [27.0f32, 28.0, 28.418_9, 29.0, 39.99, 40.0] {
        x.extend((0..2000).map(|i| -f32::from_bits(edge.to_bits() - 1000 + i)));
    }
    let n = x.len();
    let (mut exps, mut weights, mut keys) = (vec![0f32; n], vec![0u64; n], vec![0u32; n]);
    // SAFETY: as many results as arguments.
    unsafe {
        dflash_host_weights(
            x.as_ptr(),
            n as u32,
            exps.as_mut_ptr(),
            weights.as_mut_ptr(),
            keys.as_mut_ptr(),
        );
    }
    for i in 0..n {
        let expected = (exp(x[i]).to_bits(), weight(x[i]), order_key(x[i]));
        assert_eq!((exps[i].to_bits(), weights[i], keys[i]), expected, "{}", x[i]);
    }
}

#[test]
fn halves_are_the_nearest_ones_even_ones_of_two_and_what_is_no_number_stays_none() {
    let rests = [0u32, 1, 0x4000, 0x7fff, 0x8000, 0x8001, 0xffff];
    let all = (0..=0xffff).flat_map(|half: u32| rests.map(|rest| half << 16 | rest));
    let x: Vec<f32> = all.map(f32::from_bits).collect();
    let mut got = vec![0u16; x.len()];
    // SAFETY: as many results as arguments.
    unsafe { dflash_host_bf16(x.as_ptr(), x.len() as u32, got.as_mut_ptr()) };
    for (x, got) in x.into_iter().zip(got) {
        let (half, rest) = ((x.to_bits() >> 16) as u16, x.to_bits() & 0xffff);
        let up = rest > 0x8000 || rest == 0x8000 && half % 2 == 1;
        let expected = if x.is_nan() { half | 0x40 } else { half + u16::from(up) };
        assert_eq!(got, expected, "{:#x}", x.to_bits());
    }
}

#[test]
fn elements_are_the_upper_halves_of_numbers_and_nothing_of_their_neighbours() {
    let halves = [0x3f81u16, 0xc123, 0x0001, 0xffff, 0x8000, 0x7f7f, 0x0000, 0x4049];
    for turn in 0..8 {
        let at: Vec<u16> = (0..8).map(|i| halves[(i + turn) % 8]).collect();
        let mut got = [0.0f32; 8];
        // SAFETY: sixteen bytes and eight results.
        unsafe { dflash_host_elements(at.as_ptr(), got.as_mut_ptr()) };
        assert_eq!(
            got.map(f32::to_bits).to_vec(),
            at.iter().map(|&x| u32::from(x) << 16).collect::<Vec<_>>()
        );
    }
}

#[test]
fn keys_outside_a_row_of_the_table_have_no_slot() {
    let (pages, row_ids) = ([5i32, 3, 8, 6], [1i32, 0]);
    let table = PageTable {
        pages: address(&pages),
        row_ids: address(&row_ids),
        width: 2,
        page_size: 3,
    };
    let keys = [-7, -3, -1, 0, 1, 2, 3, 4, 5, 6, 7, 100];
    for (request, first, second) in [(0, 24, 18), (1, 15, 9)] {
        let mut got = [0; 12];
        // SAFETY: as many results as keys; the table outlives the call.
        unsafe { dflash_host_slots(&raw const table, request, keys.as_ptr(), 12, got.as_mut_ptr()) };
        let row = [first, first + 1, first + 2, second, second + 1, second + 2];
        assert_eq!(
            (&got[..3], &got[3..9], &got[9..]),
            (&[-1; 3][..], &row[..], &[-1; 3][..])
        );
    }
}

#[test]
fn a_packed_token_is_that_of_the_last_request_that_begins_no_later() {
    let starts = [0i32, 2, 2, 5, 6, 6, 6, 9];
    let tokens: Vec<i32> = (-2..12).collect();
    for requests in 0..starts.len() {
        let mut got = vec![0; tokens.len()];
        // SAFETY: as many results as tokens, and a start more than requests.
        unsafe {
            dflash_host_requests(
                starts.as_ptr(),
                requests as i32,
                tokens.as_ptr(),
                tokens.len() as u32,
                got.as_mut_ptr(),
            );
        }
        let owner = |&token: &i32| {
            if token < 0 || token >= starts[requests] {
                return -1;
            }
            starts[..requests].iter().rposition(|&start| start <= token).unwrap() as i32
        };
        assert_eq!(got, tokens.iter().map(owner).collect::<Vec<_>>(), "{requests}");
    }
}
