//! What reaches a driver: which kernels, in which order, on which stream, with which addresses.

use std::any::Any;
use std::cell::RefCell;

use super::calls::{self, tensor};
use dflash_rs::device::Mask;
use dflash_rs::device::cuda::launch::{self, Accept, BlockAttention, PrepareBlock, SampleRows};
use dflash_rs::device::cuda::params::{
    AcceptParams, BlockAttentionParams, CompactKvParams, DeltaRuleParams, KvInjectParams, PageTable,
    PrepareBlockParams, SampleRowsParams, TreeBuildParams, TreeTopKParams,
};
use dflash_rs::device::cuda::tensor::{Dtype, Tensor};
use dflash_rs::device::cuda::{Driver, Kernel, Launch, Usage};
use dflash_rs::error::{Error, Result};

/// A driver that writes down what it is asked for.
#[derive(Default)]
struct Recorder {
    current: i32,
    /// Refuses this kernel.
    refuses: Option<&'static str>,
    without_kernels: bool,
    launched: RefCell<Vec<Launched>>,
    loaded: RefCell<Vec<(&'static str, usize, u32)>>,
    clusters: RefCell<Vec<(&'static str, usize, Launch)>>,
    /// Has no room for a cluster of this kernel.
    no_room: Option<&'static str>,
}

struct Launched {
    kernel: &'static str,
    launch: Launch,
    stream: usize,
    parameters: Box<dyn Any>,
}

impl Driver for Recorder {
    fn current_device(&self, _: i32) -> Result<i32> {
        if self.without_kernels {
            Err(Error::NoKernels)
        } else {
            Ok(self.current)
        }
    }

    fn runs_cluster(&self, kernel: &'static Kernel, bytes: usize, launch: Launch) -> Result<bool> {
        self.clusters.borrow_mut().push((kernel.name(), bytes, launch));
        Ok(self.no_room != Some(kernel.name()))
    }

    fn load(&self, kernel: &'static Kernel, bytes: usize, shared: u32) -> Result<Usage> {
        self.loaded.borrow_mut().push((kernel.name(), bytes, shared));
        Ok(Usage {
            registers: 32,
            local: 0,
            shared: 16,
        })
    }

    unsafe fn launch<P: Copy + 'static>(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        stream: usize,
        parameters: &P,
    ) -> Result<()> {
        if self.refuses == Some(kernel.name()) {
            return Err(Error::Driver {
                call: kernel.name().into(),
                code: 1,
                name: "CUDA_ERROR_INVALID_VALUE".into(),
                text: "invalid argument".into(),
            });
        }
        self.launched.borrow_mut().push(Launched {
            kernel: kernel.name(),
            launch,
            stream,
            parameters: Box::new(*parameters),
        });
        Ok(())
    }
}

impl Recorder {
    fn run<P: Copy + 'static>(self, call: &launch::Checked<P>) -> (Self, Result<()>) {
        // SAFETY: nothing looks at the addresses.
        let done = unsafe { call.launch(&self, 77) };
        (self, done)
    }

    fn names(&self) -> Vec<&'static str> {
        self.launched.borrow().iter().map(|launched| launched.kernel).collect()
    }
}

/// Names of the kernels that a call launches, after checking that all get the same parameters and stream: those of the call.
fn launched<P: Copy + 'static + PartialEq + std::fmt::Debug>(call: &launch::Checked<P>) -> Vec<&'static str> {
    let (driver, done) = Recorder::default().run(call);
    done.unwrap();
    for (entry, (kernel, launch)) in driver.launched.borrow().iter().zip(call.launches()) {
        assert_eq!(entry.parameters.downcast_ref::<P>().unwrap(), call.parameters());
        assert_eq!((entry.kernel, entry.launch, entry.stream), (kernel.name(), *launch, 77));
    }
    assert_eq!(driver.launched.borrow().len(), call.launches().len());
    driver.names()
}

/// Where tensor `number` of a call is.
fn at(number: u64) -> u64 {
    0x7f00_0000_0000 + (number << 32)
}

fn table(number: u64) -> PageTable {
    PageTable {
        pages: at(number),
        row_ids: at(number + 1),
        width: 40,
        page_size: 16,
    }
}

#[test]
fn a_probe_gets_the_address_of_its_answer() {
    let call = calls::probe().check().unwrap();
    assert_eq!(call.parameters(), &at(0));
    assert_eq!(launched(&call), ["probe"]);
}

#[test]
fn prepare_block_gets_what_it_was_given() {
    let call = calls::prepare(3).check().unwrap();
    let expected = PrepareBlockParams {
        query_starts: at(0),
        context_lens: at(1),
        anchors: at(2),
        drafts: at(3),
        depths: at(4),
        table: table(5),
        token_ids: at(7),
        positions: at(8),
        slots: at(9),
        mask_token: 5,
        draft_stride: 7,
        num_requests: 3,
        padded_tokens: 32,
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["prepare_block"]);
    let bare = PrepareBlock {
        drafts: None,
        depths: None,
        slots: None,
        ..calls::prepare(3)
    };
    let expected = PrepareBlockParams {
        drafts: 0,
        depths: 0,
        slots: 0,
        draft_stride: 0,
        ..expected
    };
    assert_eq!(bare.check().unwrap().parameters(), &expected);
}

#[test]
fn kv_inject_gets_strides_of_the_projection_and_of_the_cache() {
    let mut inject = calls::inject(12);
    inject.cache.strides = vec![4 * 128 + 64, 128, 1];
    inject.kv.strides[0] += 512;
    let call = inject.check().unwrap();
    let expected = KvInjectParams {
        kv: at(0),
        k_norm: at(1),
        cos_sin: at(2),
        rows: at(3),
        positions: at(4),
        slots: at(5),
        k_caches: at(6),
        v_caches: at(7),
        row_stride: 5 * 2 * 4 * 128 + 512,
        layer_stride: 2 * 4 * 128,
        v_offset: 4 * 128,
        slot_stride: 4 * 128 + 64,
        head_stride: 128,
        max_rows: 12,
        num_layers: 5,
        num_heads: 4,
        rotary_dim: 64,
        eps: 1e-6,
        reserved: 0,
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["kv_inject_128"]);
}

#[test]
fn attention_gets_masks_windows_and_splits() {
    let mut attention = calls::attention(3);
    attention.q.strides = vec![24 * 128, 128, 1];
    attention.out.strides = vec![20 * 128, 128, 1];
    attention.v_cache.strides = vec![6 * 128, 128, 1];
    let call = attention.check().unwrap();
    let expected = BlockAttentionParams {
        q: at(0),
        k: at(1),
        v: at(2),
        k_cache: at(3),
        v_cache: at(4),
        out: at(5),
        query_starts: at(6),
        context_lens: at(7),
        table: table(8),
        valid_from: at(10),
        slots: at(11),
        ancestors: at(12),
        partial_out: at(13),
        partial_stats: at(14),
        sinks: at(15),
        q_stride: [24 * 128, 128],
        k_stride: [512, 128],
        v_stride: [512, 128],
        out_stride: [20 * 128, 128],
        k_cache_stride: [512, 128],
        v_cache_stride: [6 * 128, 128],
        num_requests: 3,
        q_heads: 16,
        kv_heads: 4,
        max_tokens: 24,
        max_block_len: 8,
        num_splits: 3,
        split_keys: 512,
        mask: 2,
        mask_words: 1,
        window: 9,
        scale: 0.125,
        softcap: 30.0,
        clusters: 0,
        reserved: 0,
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["block_attention_128", "block_attention_combine_128"]);

    for (mask, number) in [(Mask::Causal, 0), (Mask::Block, 1)] {
        let mut bare = BlockAttention {
            valid_from: None,
            slots: None,
            ancestors: None,
            partial_out: None,
            partial_stats: None,
            sinks: None,
            num_splits: 1,
            max_keys: 512,
            ..attention.clone()
        };
        (bare.params.mask, bare.params.window, bare.params.softcap) = (mask, None, None);
        let call = bare.check().unwrap();
        let expected = BlockAttentionParams {
            valid_from: 0,
            slots: 0,
            ancestors: 0,
            partial_out: 0,
            partial_stats: 0,
            sinks: 0,
            num_splits: 1,
            mask: number,
            mask_words: 0,
            window: 0,
            softcap: 0.0,
            ..expected
        };
        assert_eq!(call.parameters(), &expected);
        assert_eq!(launched(&call), ["block_attention_128"], "nothing to combine");
    }
}

#[test]
fn clusters_are_whole_and_what_they_merge_needs_no_memory() {
    // Splits, the cluster, the grid's third extent, parts in memory.
    for (num_splits, cluster, z, parts) in [
        (1, 1, 1, 1),
        (2, 2, 2, 1),
        (3, 4, 4, 1),
        (5, 8, 8, 1),
        (8, 8, 8, 1),
        (9, 8, 16, 2),
        (17, 8, 24, 3),
        (65528, 8, 65528, 8191),
    ] {
        let workspace = |number, width| (parts > 1).then(|| tensor(number, Dtype::F32, &[parts, 24, 16, width]));
        let attention = BlockAttention {
            clusters: true,
            num_splits,
            max_keys: num_splits * 512,
            partial_out: workspace(13, 128),
            partial_stats: workspace(64, 2),
            ..calls::attention(3)
        };
        let call = attention.check().unwrap();
        let launches = call.launches();
        assert_eq!(
            (launches[0].1.cluster, launches[0].1.grid[2]),
            (cluster, z),
            "{num_splits} splits"
        );
        assert_eq!(launches.len(), 1 + usize::from(parts > 1), "{num_splits} splits");
        assert!(launches[1..].iter().all(|(_, launch)| launch.cluster == 1));
        assert_eq!((call.parameters().clusters, launched(&call).len()), (1, launches.len()));
        if parts > 1 {
            let short = tensor(13, Dtype::F32, &[parts - 1, 24, 16, 128]);
            let error = BlockAttention {
                partial_out: Some(short),
                ..attention
            }
            .check()
            .unwrap_err();
            assert!(error.to_string().starts_with("partial_out: got shape"), "{error}");
        }
    }
}

#[test]
fn clusters_run_where_every_head_width_has_room_for_one() {
    let driver = Recorder::default();
    assert!(launch::runs_clusters(&driver, 0).unwrap());
    let asked = driver.clusters.borrow();
    let names: Vec<_> = asked.iter().map(|(name, ..)| *name).collect();
    assert_eq!(
        names,
        [
            "block_attention_64",
            "block_attention_128",
            "block_attention_256",
            "block_attention_wide_128"
        ]
    );
    for (_, bytes, launch) in asked.iter() {
        assert_eq!(
            (*bytes, launch.cluster, launch.grid),
            (size_of::<BlockAttentionParams>(), 8, [1, 1, 8])
        );
    }
    let full = Recorder {
        no_room: Some("block_attention_256"),
        ..Recorder::default()
    };
    assert!(!launch::runs_clusters(&full, 0).unwrap());
    let error = launch::runs_clusters(&driver, 1).unwrap_err();
    assert_eq!(error.to_string(), "device: got 1, expected 0, which is current");
}

#[test]
fn sampling_launches_what_the_step_needs() {
    let call = calls::sample(6).check().unwrap();
    let expected = SampleRowsParams {
        logits: at(0),
        sampling: at(1),
        query_starts: at(2),
        row_tokens: at(3),
        token_ids: at(4),
        positions: at(5),
        parents: at(6),
        history_tokens: at(7),
        history_counts: at(8),
        bias_tokens: at(9),
        bias_values: at(10),
        tokens: at(11),
        logprobs: at(12),
        status: at(13),
        scratch: at(14),
        row_stride: 10_000,
        num_rows: 6,
        num_requests: 3,
        vocab: 10_000,
        reserved: 0,
    };
    assert_eq!(call.parameters(), &expected);
    for (dtype, suffix) in [(Dtype::F32, "f32"), (Dtype::Bf16, "bf16")] {
        for (filters, logprobs, stages) in [
            (true, true, &["scan", "mass", "pick", "finish"][..]),
            (true, false, &["scan", "mass", "pick", "finish"]),
            (false, true, &["scan", "mass", "finish"]),
            (false, false, &["scan", "finish"]),
        ] {
            let mut sample = SampleRows {
                filters,
                ..calls::sample(6)
            };
            sample.logits.dtype = dtype;
            sample.logprobs = sample.logprobs.filter(|_| logprobs);
            let names: Vec<_> = stages.iter().map(|stage| format!("sample_{stage}_{suffix}")).collect();
            assert_eq!(
                launched(&sample.check().unwrap()),
                names,
                "filters {filters}, logprobs {logprobs}"
            );
        }
    }
}

#[test]
fn acceptance_writes_where_it_was_told_and_may_advance_lengths_in_place() {
    let call = calls::accept(3).check().unwrap();
    let expected = AcceptParams {
        query_starts: at(0),
        logit_starts: at(1),
        context_lens: at(2),
        node_counts: at(3),
        token_ids: at(4),
        parents: at(5),
        sampled: at(6),
        table: table(7),
        accepted: at(9),
        out_tokens: at(10),
        out_lens: at(11),
        new_context_lens: at(12),
        next_anchors: at(13),
        path: at(14),
        commit_rows: at(15),
        commit_positions: at(16),
        commit_slots: at(17),
        out_stride: 8,
        path_stride: 8,
        num_requests: 3,
        max_nodes: 8,
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["accept"]);
    let in_place = Accept {
        new_context_lens: tensor(2, Dtype::I32, &[3]),
        path: None,
        ..calls::accept(3)
    };
    let expected = AcceptParams {
        new_context_lens: at(2),
        path: 0,
        path_stride: 0,
        ..expected
    };
    assert_eq!(in_place.check().unwrap().parameters(), &expected);
}

#[test]
fn a_recurrent_layer_gets_its_tensors_and_copies_get_no_tokens() {
    let call = calls::delta(3).check().unwrap();
    let expected = DeltaRuleParams {
        mixed: at(0),
        gates: at(1),
        weight: at(2),
        decay: at(3),
        dt_bias: at(4),
        query_starts: at(5),
        context_lens: at(6),
        slots: at(7),
        into: 0,
        ends: at(8),
        memory: at(9),
        window: at(10),
        kept: at(11),
        kept_gates: at(12),
        stands: at(13),
        end_memory: at(14),
        end_window: at(15),
        out: at(16),
        made: at(17),
        scales: at(18),
        pending: at(19),
        num_requests: 3,
        num_tokens: 24,
        longest: 8,
        block: 4,
        key_heads: 2,
        value_heads: 6,
        key_dim: 96,
        value_dim: 48,
        taps: 4,
        beta_scale: 2.0,
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["delta_inputs", "delta_rule_96"]);
    let call = calls::delta_copies(3).check().unwrap();
    let expected = DeltaRuleParams {
        mixed: at(0),
        into: at(20),
        ends: 0,
        end_memory: 0,
        end_window: 0,
        num_tokens: 0,
        longest: 0,
        ..expected
    };
    assert_eq!(call.parameters(), &expected);
    assert_eq!(launched(&call), ["delta_inputs", "delta_rule_96"]);
}

#[test]
fn trees_and_compaction_get_what_they_were_given() {
    let call = calls::top_k(6).check().unwrap();
    let expected = TreeTopKParams {
        values: at(0),
        tokens: at(1),
        log_probs: at(2),
        row_stride: 100,
        num_rows: 6,
        vocab: 100,
        k: 4,
        normalise: 1,
    };
    assert_eq!(
        (call.parameters(), launched(&call)),
        (&expected, vec!["tree_top_k_bf16"])
    );
    let call = calls::tree(3).check().unwrap();
    let expected = TreeBuildParams {
        anchors: at(0),
        top_tokens: at(1),
        top_log_probs: at(2),
        budgets: at(3),
        tokens: at(4),
        parents: at(5),
        depths: at(6),
        counts: at(7),
        scores: at(8),
        first_child: at(9),
        next_sibling: at(10),
        masks: at(11),
        num_requests: 3,
        max_depth: 7,
        k: 4,
        max_nodes: 69,
    };
    assert_eq!((call.parameters(), launched(&call)), (&expected, vec!["tree_build"]));
    let call = calls::compact(3).check().unwrap();
    let expected = CompactKvParams {
        path: at(0),
        context_lens: at(1),
        k_caches: at(2),
        v_caches: at(3),
        table: table(5),
        path_stride: 8,
        slot_stride: 512,
        head_stride: 128,
        num_requests: 3,
        num_layers: 5,
        num_heads: 4,
        head_dim: 128,
    };
    assert_eq!((call.parameters(), launched(&call)), (&expected, vec!["compact_kv"]));
}

#[test]
fn heads_of_every_width_have_a_kernel_of_their_own() {
    for (dim, name) in [(64, "64"), (128, "128"), (256, "256")] {
        let mut attention = calls::attention(2);
        let wide = |t: &mut Tensor, at: usize| {
            t.shape[at] = dim;
            t.strides = calls::dense(&t.shape);
        };
        let BlockAttention {
            q,
            k,
            v,
            k_cache,
            v_cache,
            out,
            ..
        } = &mut attention;
        for t in [q, k, v, k_cache, v_cache, out] {
            wide(t, 2);
        }
        wide(attention.partial_out.as_mut().unwrap(), 3);
        assert_eq!(
            launched(&attention.check().unwrap()),
            [
                format!("block_attention_{name}"),
                format!("block_attention_combine_{name}")
            ]
        );
        let mut inject = calls::inject(4);
        wide(&mut inject.kv, 4);
        wide(&mut inject.k_norm, 1);
        wide(&mut inject.cache, 2);
        assert_eq!(launched(&inject.check().unwrap()), [format!("kv_inject_{name}")]);
    }
}

#[test]
fn tensors_of_another_device_than_the_current_one_launch_nothing() {
    let call = calls::attention(3).check().unwrap();
    let (driver, done) = Recorder {
        current: 1,
        ..Default::default()
    }
    .run(&call);
    let message = done.unwrap_err().to_string();
    assert!(
        message.contains("device: got tensors on cuda:0 while cuda:1 is current, expected the tensors'"),
        "{message}"
    );
    assert!(driver.names().is_empty());
}

#[test]
fn a_build_without_kernels_says_so_before_anything_is_launched() {
    let call = calls::tree(3).check().unwrap();
    let (driver, done) = Recorder {
        without_kernels: true,
        ..Default::default()
    }
    .run(&call);
    assert_eq!((done, driver.names().len()), (Err(Error::NoKernels), 0));
}

#[test]
fn what_follows_a_kernel_that_the_driver_refused_is_not_launched() {
    let call = calls::sample(6).check().unwrap();
    let refuses = Some("sample_pick_f32");
    let (driver, done) = Recorder {
        refuses,
        ..Default::default()
    }
    .run(&call);
    assert!(matches!(done, Err(Error::Driver { code: 1, .. })));
    assert_eq!(driver.names(), ["sample_scan_f32", "sample_mass_f32"]);
}

#[test]
fn every_kernel_of_the_build_is_loaded_once_with_the_shared_memory_its_launches_take() {
    let driver = Recorder::default();
    let found = launch::load(&driver).unwrap();
    let loaded = driver.loaded.into_inner();
    let mut names: Vec<_> = loaded.iter().map(|&(name, ..)| name).collect();
    assert_eq!(names, found.iter().map(|&(name, _)| name).collect::<Vec<_>>());
    names.sort_unstable();
    let mut table: Vec<_> = include_str!("../../cuda/registers.txt")
        .lines()
        .skip(2)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    table.sort_unstable();
    table.dedup();
    assert_eq!(names, table);
    let of = |name: &str| *loaded.iter().find(|(known, ..)| *known == name).unwrap();
    let attention = calls::attention(3).check().unwrap();
    assert_eq!(of("block_attention_128").2, attention.launches()[0].1.shared);
    assert_eq!(of("block_attention_128").1, size_of::<BlockAttentionParams>());
    assert_eq!(of("sample_mass_bf16").1, size_of::<SampleRowsParams>());
    assert_eq!(
        of("tree_build"),
        ("tree_build", size_of::<TreeBuildParams>(), 1024 * 48)
    );
}
