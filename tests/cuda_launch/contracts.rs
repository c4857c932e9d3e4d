//! Every tensor of every call spoilt in every way, one at a time: what is still accepted is listed, everything else is refused by name.

use super::calls::{self, Call, dense};
use dflash_rs::device::cuda::tensor::{Dtype, Tensor};

/// The ways to spoil a tensor, each with a name.
type Ways = fn(&Tensor) -> Vec<(String, Tensor)>;

/// Spoils every tensor of `call` in all `ways` and says which are accepted; a refusal names the tensor, or one whose shape or place it
/// has to share.
fn accepted<C: Call>(call: &C, ways: Ways) -> Vec<String> {
    let mut found = Vec::new();
    assert!(call.plan().is_ok(), "{}: {:?}", C::NAME, call.plan());
    let names: Vec<_> = call.clone().tensors().into_iter().map(|(name, _)| name).collect();
    for (index, name) in names.iter().enumerate() {
        let own = call.clone().tensors()[index].1.clone();
        for (way, spoilt) in ways(&own) {
            let mut other = call.clone();
            *other.tensors()[index].1 = spoilt;
            match other.plan() {
                Ok(_) => found.push(format!("{name} {way}")),
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        names.iter().any(|name| text.starts_with(name)) || text.starts_with("head_dim"),
                        "{} with {name} {way}: {text}",
                        C::NAME
                    );
                }
            }
        }
    }
    found
}

/// The same where the refusal has to name the tensor itself.
fn refused_by_name<C: Call>(call: &C, ways: Ways, text: &str) {
    let names: Vec<_> = call.clone().tensors().into_iter().map(|(name, _)| name).collect();
    for (index, name) in names.iter().enumerate() {
        let own = call.clone().tensors()[index].1.clone();
        for (way, spoilt) in ways(&own) {
            let mut other = call.clone();
            *other.tensors()[index].1 = spoilt;
            let error = other
                .plan()
                .expect_err(&format!("{} with {name} {way} is accepted", C::NAME))
                .to_string();
            assert!(
                error.starts_with(&format!("{name}: ")) && error.contains(text),
                "{} with {name} {way}: {error}",
                C::NAME
            );
        }
    }
}

fn reshaped(tensor: &Tensor, shape: Vec<usize>) -> Tensor {
    Tensor {
        strides: dense(&shape),
        shape,
        ..tensor.clone()
    }
}

fn one_more_or_less(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let mut all = Vec::new();
    for dimension in 0..tensor.shape.len() {
        for (sign, change) in [("+1", 1), ("-1", usize::MAX)] {
            let mut shape = tensor.shape.clone();
            shape[dimension] = shape[dimension].wrapping_add(change);
            all.push((format!("[{dimension}]{sign}"), reshaped(tensor, shape)));
        }
    }
    all
}

fn another_rank(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let more = [tensor.shape.clone(), vec![1]].concat();
    let less = tensor.shape[..tensor.shape.len() - 1].to_vec();
    vec![
        ("with one dimension more".into(), reshaped(tensor, more)),
        ("with one dimension less".into(), reshaped(tensor, less)),
    ]
}

fn another_type(tensor: &Tensor) -> Vec<(String, Tensor)> {
    use Dtype::{Bf16, F32, I32, I64, U8, U64};
    let others = [Bf16, F32, I32, I64, U8, U64]
        .into_iter()
        .filter(|&d| d != tensor.dtype);
    let of = |dtype: Dtype| {
        (
            format!("as {}", dtype.name()),
            Tensor {
                dtype,
                ..tensor.clone()
            },
        )
    };
    others.map(of).collect()
}

fn on_the_cpu(tensor: &Tensor) -> Vec<(String, Tensor)> {
    vec![(
        "on the CPU".into(),
        Tensor {
            device: -1,
            ..tensor.clone()
        },
    )]
}

fn nowhere(tensor: &Tensor) -> Vec<(String, Tensor)> {
    vec![(
        "nowhere".into(),
        Tensor {
            address: 0,
            ..tensor.clone()
        },
    )]
}

fn off_by_a_byte(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let address = tensor.address + 1;
    vec![(
        "a byte further".into(),
        Tensor {
            address,
            ..tensor.clone()
        },
    )]
}

/// Gaps of 16 bytes between rows, and rows backwards.
fn with_gaps(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let mut all = Vec::new();
    for dimension in 0..tensor.shape.len() - 1 {
        if tensor.shape[dimension] > 1 {
            let mut strides = tensor.strides.clone();
            strides[dimension] += 8;
            all.push((
                format!("with gaps in [{dimension}]"),
                Tensor {
                    strides,
                    ..tensor.clone()
                },
            ));
        }
    }
    all
}

fn backwards(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let mut strides = tensor.strides.clone();
    strides[0] = -strides[0];
    if tensor.shape[0] < 2 {
        return Vec::new();
    }
    vec![(
        "backwards".into(),
        Tensor {
            strides,
            ..tensor.clone()
        },
    )]
}

fn without_strides(tensor: &Tensor) -> Vec<(String, Tensor)> {
    let strides = tensor.strides[1..].to_vec();
    vec![(
        "with a stride less".into(),
        Tensor {
            strides,
            ..tensor.clone()
        },
    )]
}

/// For every family: `check!(call => whatever is done with `call`)`.
macro_rules! every {
    ($call:ident => $body:expr) => {{
        {
            let $call = calls::probe();
            $body
        }
        {
            let $call = calls::prepare(3);
            $body
        }
        {
            let $call = calls::inject(12);
            $body
        }
        {
            let $call = calls::attention(3);
            $body
        }
        {
            let $call = calls::sample(6);
            $body
        }
        {
            let $call = calls::accept(3);
            $body
        }
        {
            let $call = calls::top_k(6);
            $body
        }
        {
            let $call = calls::tree(3);
            $body
        }
        {
            let $call = calls::compact(3);
            $body
        }
        {
            let $call = calls::delta(3);
            $body
        }
    }};
}

#[test]
fn an_extent_that_is_one_off_is_refused_unless_it_is_free() {
    let is = |found: Vec<String>, free: &[&str]| assert_eq!(found, free);
    let off = one_more_or_less;
    is(accepted(&calls::probe(), off), &[]);
    is(
        accepted(&calls::prepare(3), off),
        // Drafts may be wider than blocks, page tables larger than batches.
        &[
            "drafts [1]+1",
            "drafts [1]-1",
            "page_table [0]+1",
            "page_table [0]-1",
            "page_table [1]+1",
            "page_table [1]-1",
        ],
    );
    is(
        accepted(&calls::inject(12), off),
        &[
            "kv [0]+1",
            "kv [0]-1",
            "cos_sin [0]+1",
            "cos_sin [0]-1",
            "cache [0]+1",
            "cache [0]-1",
        ],
    );
    is(
        accepted(&calls::attention(3), off),
        &[
            "ancestors [1]+1",
            "partial_out [0]+1",
            "partial_stats [0]+1",
            "page_table [0]+1",
            "page_table [0]-1",
            "page_table [1]+1",
            "page_table [1]-1",
        ],
    );
    is(
        accepted(&calls::sample(6), off),
        &["logits [1]+1", "logits [1]-1", "scratch [0]+1"],
    );
    is(
        accepted(&calls::accept(3), off),
        &[
            "sampled [0]+1",
            "sampled [0]-1",
            "out_tokens [1]+1",
            "path [1]+1",
            "page_table [0]+1",
            "page_table [0]-1",
            "page_table [1]+1",
            "page_table [1]-1",
        ],
    );
    is(accepted(&calls::top_k(6), off), &["values [1]+1", "values [1]-1"]);
    is(accepted(&calls::tree(3), off), &[]);
    is(
        accepted(&calls::compact(3), off),
        &[
            "path [1]+1",
            "path [1]-1",
            "cache [0]+1",
            "cache [0]-1",
            "cache [1]+1",
            "cache [1]-1",
            "page_table [0]+1",
            "page_table [0]-1",
            "page_table [1]+1",
            "page_table [1]-1",
        ],
    );
    // Scratch may be larger.
    is(accepted(&calls::delta(3), off), &["made [0]+1", "scales [0]+1"]);
}

#[test]
fn without_starts_of_their_own_rows_and_tokens_are_as_many() {
    let accept = dflash_rs::device::cuda::launch::Accept {
        logit_starts: None,
        ..calls::accept(3)
    };
    assert!(
        !accepted(&accept, one_more_or_less)
            .iter()
            .any(|way| way.starts_with("sampled"))
    );
    let inject = dflash_rs::device::cuda::launch::KvInject {
        rows: None,
        kv: calls::tensor(0, Dtype::Bf16, &[12, 5, 2, 4, 128]),
        ..calls::inject(12)
    };
    assert!(
        !accepted(&inject, one_more_or_less)
            .iter()
            .any(|way| way.starts_with("kv"))
    );
}

#[test]
fn another_type_is_refused_but_for_logits_and_the_sign_of_masks() {
    let found = |found: Vec<String>, allowed: &[&str]| assert_eq!(found, allowed);
    found(accepted(&calls::probe(), another_type), &[]);
    found(accepted(&calls::prepare(3), another_type), &[]);
    found(accepted(&calls::inject(12), another_type), &[]);
    found(accepted(&calls::attention(3), another_type), &["ancestors as int64"]);
    found(accepted(&calls::sample(6), another_type), &["logits as bfloat16"]);
    found(accepted(&calls::accept(3), another_type), &[]);
    found(accepted(&calls::top_k(6), another_type), &["values as float32"]);
    found(accepted(&calls::tree(3), another_type), &["masks as int64"]);
    found(accepted(&calls::compact(3), another_type), &[]);
    found(accepted(&calls::delta(3), another_type), &[]);
}

#[test]
fn a_tensor_of_another_rank_is_refused() {
    every!(call => assert_eq!(accepted(&call, another_rank), [""; 0]));
}

#[test]
fn a_tensor_that_is_not_on_the_device_or_nowhere_is_refused_by_its_name() {
    every!(call => refused_by_name(&call, on_the_cpu, "a tensor on the CPU, expected one on a CUDA device"));
    every!(call => refused_by_name(&call, nowhere, "null pointer, expected the address of"));
    every!(call => refused_by_name(&call, without_strides, "one per dimension"));
    every!(call => refused_by_name(&call, backwards, "strides ["));
}

#[test]
fn an_address_that_is_off_by_a_byte_is_refused_by_its_name() {
    every!(call => refused_by_name(&call, off_by_a_byte, "is not aligned to"));
}

#[test]
fn tensors_of_two_devices_are_refused_and_the_first_one_is_named() {
    fn check<C: Call>(call: &C) {
        let count = call.clone().tensors().len();
        for index in 0..count {
            let mut other = call.clone();
            other.tensors()[index].1.device = 1;
            match other.plan() {
                Ok(_) => assert_eq!(count, 1, "{}: one tensor is where it is", C::NAME),
                Err(error) => assert!(error.to_string().contains("expected one on cuda:"), "{error}"),
            }
        }
    }
    every!(call => check(&call));
}

#[test]
fn gaps_between_rows_are_for_strided_tensors_only() {
    fn check<C: Call>(call: &C) {
        for way in accepted(call, with_gaps) {
            let name = way.split(' ').next().unwrap();
            assert!(C::STRIDED.contains(&name), "{}: {way}", C::NAME);
        }
    }
    every!(call => check(&call));
    // Heads of the projection lie next to each other; its rows and layers need not.
    assert_eq!(
        accepted(&calls::inject(12), with_gaps),
        [
            "kv with gaps in [0]",
            "kv with gaps in [1]",
            "kv with gaps in [2]",
            "cache with gaps in [0]"
        ]
    );
    assert!(accepted(&calls::attention(3), with_gaps).contains(&"q with gaps in [0]".into()));
}

#[test]
fn rows_that_are_read_sixteen_bytes_at_a_time_start_at_multiples_of_them() {
    fn off_by_half_a_vector(tensor: &Tensor) -> Vec<(String, Tensor)> {
        let mut strides = tensor.strides.clone();
        strides[0] += 4;
        let spoilt = Tensor {
            strides,
            ..tensor.clone()
        };
        vec![("with gaps of 8 bytes".into(), spoilt)]
    }
    every!(call => {
        let found = accepted(&call, off_by_half_a_vector);
        // A single row has no next one; logits are read one by one.
        assert!(found.iter().all(|way| ["out", "logits", "values"].contains(&way.split(' ').next().unwrap())), "{found:?}");
    });
    assert!(accepted(&calls::attention(3), off_by_half_a_vector).is_empty());
    assert_eq!(
        accepted(&calls::sample(6), off_by_half_a_vector),
        ["logits with gaps of 8 bytes"]
    );
}

#[test]
fn partial_results_are_aligned_to_what_the_combining_kernel_loads_at_once() {
    for (name, off, alignment) in [("partial_out", 8, 16), ("partial_stats", 4, 8)] {
        let mut call = calls::attention(3);
        call.check().unwrap();
        for (other, tensor) in call.tensors() {
            if other == name {
                tensor.address += off;
            }
        }
        let why = call.check().unwrap_err().to_string();
        assert!(why.contains(name) && why.contains(&alignment.to_string()), "{why}");
    }
}

#[test]
fn memory_that_is_written_is_shared_with_nothing() {
    fn check<C: Call>(call: &C) {
        let names: Vec<_> = call.clone().tensors().into_iter().map(|(name, _)| name).collect();
        for (a, first) in names.iter().enumerate() {
            for (b, second) in names.iter().enumerate() {
                if a == b {
                    continue;
                }
                let mut other = call.clone();
                let address = other.tensors()[b].1.address;
                other.tensors()[a].1.address = address;
                let written = C::WRITTEN.contains(first) || C::WRITTEN.contains(second);
                // Lengths may be advanced in place.
                let mut pair = [*first, *second];
                pair.sort_unstable();
                let in_place = pair == ["context_lens", "new_context_lens"];
                match other.plan() {
                    Ok(_) => assert!(!written || in_place, "{}: {first} in the place of {second}", C::NAME),
                    Err(error) => {
                        assert!(
                            written && !in_place,
                            "{}: {first} in the place of {second}: {error}",
                            C::NAME
                        );
                        assert!(error.to_string().contains("expected memory of its own"), "{error}");
                    }
                }
            }
        }
    }
    every!(call => check(&call));
}

#[test]
fn what_is_advanced_in_place_is_still_looked_at() {
    let mut call = calls::accept(3);
    call.context_lens = Tensor {
        shape: vec![2],
        ..call.new_context_lens.clone()
    };
    let error = call.check().unwrap_err().to_string();
    assert!(
        error.contains("context_lens: got shape [2], expected shape [3]"),
        "{error}"
    );
}

#[test]
fn caches_are_only_written_where_slots_say_so() {
    let mut call = calls::attention(3);
    call.slots = None;
    call.k_cache.address = call.k.address;
    assert!(call.check().is_ok(), "nothing is stored, so keys and cache may be one");
}
