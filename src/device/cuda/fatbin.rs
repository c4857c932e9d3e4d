//! The compiled kernels in this library, and which GPUs and drivers they are for.

/// Code that the fatbin holds, such as `sm_80,compute_80,sm_90a`; empty when there is none.
pub const ARCHITECTURES: &str = env!("DFLASH_BUILT_ARCHS");
/// Version of the nvcc that compiled it, such as `13.0.88`; empty when there is none.
pub const NVCC: &str = env!("DFLASH_BUILT_NVCC");

/// The driver reads 64-bit fields of the fatbin's header.
#[repr(C, align(16))]
pub(super) struct Aligned<B: ?Sized>(pub B);
pub(super) static FATBIN: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// Bytes of compiled kernels in this library.
pub fn fatbin_bytes() -> usize {
    FATBIN.0.len()
}

/// Oldest driver that runs the kernels, as `(major, minor)`: code of one CUDA major version runs on drivers of the same or a later
/// one, and loading libraries without a context came with 12.0.
pub(super) fn oldest_driver() -> (u32, u32) {
    let major = NVCC
        .split('.')
        .next()
        .and_then(|major| major.parse().ok())
        .unwrap_or(12);
    (major, if major == 12 { 4 } else { 0 })
}

/// Whether code of the fatbin runs on compute capability `major.minor`: a binary of the same major version and no newer minor one
/// (of exactly this one where it ends in `a`), or PTX of the same or an older version.
pub fn runs_on(major: i32, minor: i32) -> bool {
    covers(ARCHITECTURES, major, minor)
}

fn covers(built: &str, major: i32, minor: i32) -> bool {
    let capability = major * 10 + minor;
    built.split(',').any(|code| {
        let number = |text: &str| text.trim_end_matches(['a', 'f']).parse::<i32>().ok();
        let exact = code.ends_with('a');
        if let Some(built) = code.strip_prefix("sm_").and_then(number) {
            built == capability || (!exact && built / 10 == major && built <= capability)
        } else if let Some(built) = code.strip_prefix("compute_").and_then(number) {
            built == capability || (!exact && built <= capability)
        } else {
            false
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_runs_within_its_major_version_and_ptx_on_everything_later() {
        let built = "sm_80,compute_80,sm_90a,sm_100,sm_120,compute_120";
        for (major, minor) in [
            (8, 0),
            (8, 6),
            (8, 9),
            (9, 0),
            (10, 0),
            (10, 3),
            (12, 0),
            (12, 1),
            (11, 0),
            (13, 0),
        ] {
            assert!(covers(built, major, minor), "{major}.{minor}");
        }
        assert!(!covers(built, 7, 5));
        assert!(!covers("sm_90a", 8, 9));
        assert!(!covers("sm_90a", 10, 0));
        assert!(covers("sm_90a", 9, 0));
        assert!(!covers("", 9, 0));
    }
}
