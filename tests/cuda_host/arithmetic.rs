use dflash_host_check as _;

use super::numbers::{Numbers, share};
use crate::verify::math::{exp, order_key, weight};

unsafe extern "C" {
    fn dflash_host_weights(x: *const f32, count: u32, exps: *mut f32, weights: *mut u64, keys: *mut u32);
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
