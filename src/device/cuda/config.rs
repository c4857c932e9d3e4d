//! A launch as the driver takes it: the structures of cuda.h.

use std::ffi::{c_uint, c_void};

use super::params::Launch;

/// What the driver hands out and takes back.
pub(super) type Handle = *mut c_void;

const LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: c_uint = 4;

/// `CUlaunchConfig` of cuda.h.
#[repr(C)]
pub(super) struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// `CUlaunchAttribute` of cuda.h with the value `clusterDim`, and the rest of the 64 bytes that any value has.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    cluster: [c_uint; 3],
    rest: [c_uint; 13],
}

/// `launch` as the driver takes it, with the one attribute of clusters where there are any; calls `then` with it.
pub(super) fn with_config<T>(launch: Launch, stream: usize, then: impl FnOnce(*const LaunchConfig) -> T) -> T {
    let cluster = LaunchAttribute {
        id: LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        padding: 0,
        cluster: [1, 1, launch.cluster],
        rest: [0; 13],
    };
    let config = LaunchConfig {
        grid: launch.grid,
        block: [launch.block, 1, 1],
        shared: launch.shared,
        stream: std::ptr::with_exposed_provenance_mut(stream),
        attributes: &raw const cluster,
        attribute_count: c_uint::from(launch.cluster > 1),
    };
    then(&raw const config)
}
