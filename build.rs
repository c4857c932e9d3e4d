//! Compiles `cuda/*.cu` to one fatbin that the crate embeds, where an nvcc is at hand.
//!
//! ```text
//! DFLASH_CUDA        auto (default): compile if an nvcc is found | 1: a missing nvcc is an error | 0: no kernels
//! DFLASH_NVCC        the nvcc to use; else the Python package's, CUDA_HOME's, the first on PATH
//! DFLASH_CUDA_ARCHS  what to compile for, such as "90a" while working on a kernel; default: every architecture
//! ```
//!
//! Without an nvcc the fatbin is empty and everything else builds. The result is kept in the target folder under a hash of
//! everything that went into it: clippy, tests and the wheel compile the kernels once between them.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Older compilers do not know the newest architectures.
const OLDEST_NVCC: (u32, u32) = (12, 8);

/// `(virtual architecture, code)`: binaries for each generation, PTX where a later one can start from it.
const ARCHS: &[(&str, &[&str])] = &[
    ("compute_80", &["sm_80", "compute_80"]),
    ("compute_90a", &["sm_90a"]),
    ("compute_100", &["sm_100"]),
    ("compute_120", &["sm_120", "compute_120"]),
];

/// Where the compiler of the Python package lies. torch brings a folder of the same name without a compiler in it.
const PACKAGE: &str = "cu13/bin/nvcc";

struct Nvcc {
    path: PathBuf,
    /// `13.0.88`.
    version: String,
    /// Where the runtime's headers may lie when compiler and runtime are Python packages of different environments.
    headers: Vec<PathBuf>,
}

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let cuda = root.join("cuda");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    for name in [
        "DFLASH_CUDA",
        "DFLASH_NVCC",
        "DFLASH_CUDA_ARCHS",
        "CUDA_HOME",
        "PYO3_PYTHON",
        "VIRTUAL_ENV",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let mode = env::var("DFLASH_CUDA").unwrap_or_default();
    let nvcc = match mode.as_str() {
        "0" => None,
        "1" => Some(find().unwrap_or_else(|why| {
            fail(&format!(
                "DFLASH_CUDA=1 asks for CUDA kernels, but {why}: install one (pip install -r scripts/nvcc-requirements.txt), \
                 name one in DFLASH_NVCC, or set DFLASH_CUDA=0"
            ))
        })),
        "" | "auto" => match find() {
            Ok(nvcc) => Some(nvcc),
            // A compiler that was asked for by name is not a matter of finding.
            Err(why) if env::var_os("DFLASH_NVCC").is_some_and(|v| !v.is_empty()) => fail(&why),
            Err(_) => None,
        },
        other => fail(&format!("DFLASH_CUDA: got {other:?}, expected 0, 1 or auto")),
    };
    let fatbin = out.join("kernels.fatbin");
    let Some(nvcc) = nvcc else {
        write(&fatbin, b"");
        println!("cargo:rustc-env=DFLASH_BUILT_ARCHS=");
        println!("cargo:rustc-env=DFLASH_BUILT_NVCC=");
        return;
    };
    println!("cargo:rerun-if-changed={}", nvcc.path.display());
    let archs = architectures();
    compile(&nvcc, &cuda, &archs, &out, &fatbin);
    let names: Vec<&str> = archs
        .iter()
        .flat_map(|(_, code)| code.iter().map(String::as_str))
        .collect();
    println!("cargo:rustc-env=DFLASH_BUILT_ARCHS={}", names.join(","));
    println!("cargo:rustc-env=DFLASH_BUILT_NVCC={}", nvcc.version);
}

fn fail(why: &str) -> ! {
    eprintln!("error: {why}");
    std::process::exit(1);
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
}

/// The compiler, or why there is none.
fn find() -> Result<Nvcc, String> {
    let folders = package_folders();
    if let Some(path) = env::var_os("DFLASH_NVCC").filter(|v| !v.is_empty()) {
        let path = Path::new(&path);
        return ask(path, &folders).map_err(|why| format!("DFLASH_NVCC names {}: {why}", path.display()));
    }
    let mut refused = String::new();
    for path in candidates(&folders) {
        match ask(&path, &folders) {
            Ok(nvcc) => return Ok(nvcc),
            Err(why) => {
                println!("cargo:warning={}: {why}, not used", path.display());
                let _ = write!(refused, "; {}: {why}", path.display());
            }
        }
    }
    Err(format!(
        "no usable nvcc was found (looked for DFLASH_NVCC, nvidia/{PACKAGE} among the Python packages, CUDA_HOME, PATH{refused})"
    ))
}

fn candidates(folders: &[PathBuf]) -> Vec<PathBuf> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let mut found: Vec<PathBuf> = folders.iter().map(|folder| folder.join(PACKAGE)).collect();
    if let Some(home) = env::var_os("CUDA_HOME").filter(|v| !v.is_empty()) {
        found.push(Path::new(&home).join("bin").join(&name));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    found.extend(env::split_paths(&path).map(|folder| folder.join(&name)));
    found.retain(|path| path.is_file());
    found
}

/// The folders of the Python namespace package `nvidia`.
fn package_folders() -> Vec<PathBuf> {
    let code = "import importlib.util as u; s = u.find_spec('nvidia'); print(*(s.submodule_search_locations if s else []), sep='\\n')";
    let python = env::var_os("PYO3_PYTHON")
        .or_else(|| env::var_os("VIRTUAL_ENV").map(|venv| Path::new(&venv).join("bin/python").into()))
        .unwrap_or_else(|| "python3".into());
    match Command::new(python).args(["-c", code]).output() {
        Ok(done) if done.status.success() => String::from_utf8_lossy(&done.stdout)
            .lines()
            .map(PathBuf::from)
            .collect(),
        _ => Vec::new(),
    }
}

fn ask(path: &Path, folders: &[PathBuf]) -> Result<Nvcc, String> {
    let done = Command::new(path)
        .arg("--version")
        .output()
        .map_err(|e| format!("it does not run ({e})"))?;
    let text = String::from_utf8_lossy(&done.stdout);
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let version = text
        .split_whitespace()
        .rev()
        .find_map(|word| {
            word.strip_prefix('V')
                .filter(|v| v.starts_with(|c: char| c.is_ascii_digit()))
        })
        .ok_or("its --version shows no version")?;
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let release = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if release < OLDEST_NVCC {
        return Err(format!(
            "version {version}, expected {}.{} or newer",
            OLDEST_NVCC.0, OLDEST_NVCC.1
        ));
    }
    let headers = if folders.iter().any(|folder| path.starts_with(folder)) {
        folders
            .iter()
            .map(|folder| folder.join("cu13/include"))
            .filter(|folder| folder.is_dir())
            .collect()
    } else {
        Vec::new()
    };
    Ok(Nvcc {
        path: path.to_path_buf(),
        version: version.into(),
        headers,
    })
}

/// What to compile for: `DFLASH_CUDA_ARCHS` as "80", "90a", "120+ptx", separated by commas or spaces.
fn architectures() -> Vec<(String, Vec<String>)> {
    let wanted = env::var("DFLASH_CUDA_ARCHS").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split([',', ' ']).filter(|part| !part.is_empty()).collect();
    if wanted.is_empty() {
        return ARCHS
            .iter()
            .map(|(arch, code)| ((*arch).into(), code.iter().map(|&c| c.into()).collect()))
            .collect();
    }
    wanted
        .into_iter()
        .map(|part| {
            let (number, ptx) = part.strip_suffix("+ptx").map_or((part, false), |number| (number, true));
            let digits = number.trim_end_matches(['a', 'f']);
            if digits.len() < 2 || !digits.bytes().all(|b| b.is_ascii_digit()) {
                fail(&format!(
                    "DFLASH_CUDA_ARCHS: got {part:?}, expected architectures such as 80, 90a or 120+ptx"
                ));
            }
            let mut code = vec![format!("sm_{number}")];
            if ptx {
                code.push(format!("compute_{number}"));
            }
            (format!("compute_{number}"), code)
        })
        .collect()
}

/// One translation unit of all kernel files: their headers are read once per architecture.
fn compile(nvcc: &Nvcc, cuda: &Path, archs: &[(String, Vec<String>)], out: &Path, fatbin: &Path) {
    let files = sources(cuda);
    let mut unit = String::new();
    for (path, _) in files
        .iter()
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "cu"))
    {
        let _ = writeln!(
            unit,
            "#include \"{}\"",
            path.file_name().expect("a file").to_string_lossy()
        );
    }
    if unit.is_empty() {
        fail(&format!("{}: no *.cu in it", cuda.display()));
    }
    let mut flags: Vec<String> = [
        "-std=c++17",
        "-O3",
        "-fatbin",
        "-lineinfo",
        "-Xptxas",
        "-v",
        "-Xfatbin",
        "-compress-all",
        "--threads",
        "2",
    ]
    .map(String::from)
    .into();
    for (arch, code) in archs {
        flags.push("-gencode".into());
        flags.push(format!("arch={arch},code=[{}]", code.join(",")));
    }
    let mut hash = DefaultHasher::new();
    (&unit, &flags, &nvcc.version).hash(&mut hash);
    for (path, text) in &files {
        (path.file_name(), text).hash(&mut hash);
    }
    let log = out.join("kernels.ptxas");
    let kept = target_folder(out).map(|target| {
        let stem = target.join("dflash-kernels").join(format!("{:016x}", hash.finish()));
        (stem.with_extension("fatbin"), stem.with_extension("ptxas"))
    });
    if let Some((kept_fatbin, kept_log)) = &kept
        && fs::copy(kept_log, &log).is_ok()
        && fs::copy(kept_fatbin, fatbin).is_ok()
    {
        return;
    }
    let source = out.join("kernels.cu");
    write(&source, unit.as_bytes());
    let done = Command::new(&nvcc.path)
        .args(&flags)
        .arg("-I")
        .arg(cuda)
        .args(nvcc.headers.iter().flat_map(|folder| [Path::new("-I"), folder]))
        .arg("-o")
        .arg(fatbin)
        .arg(&source)
        .output()
        .unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.path.display())));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    if !done.status.success() {
        fail(&format!(
            "{} could not compile cuda/*.cu ({}); DFLASH_CUDA=0 builds without kernels\n{stdout}{stderr}",
            nvcc.path.display(),
            done.status,
        ));
    }
    write(&log, format!("{stdout}{stderr}").as_bytes());
    // Kept for the next build; a failure to keep it costs time, nothing else. Renamed into place: another build may look.
    if let Some((kept_fatbin, kept_log)) = kept {
        for (from, to) in [(fatbin, &kept_fatbin), (log.as_path(), &kept_log)] {
            let part = to.with_extension(std::process::id().to_string());
            let _ = fs::create_dir_all(to.parent().expect("a folder above it"))
                .and_then(|()| fs::copy(from, &part))
                .and_then(|_| fs::rename(&part, to));
        }
    }
}

/// The kernel files and, transitively, the headers of this folder that they include, with their text, by name.
fn sources(cuda: &Path) -> Vec<(PathBuf, String)> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
    let mut waiting: Vec<PathBuf> = fs::read_dir(cuda)
        .unwrap_or_else(|e| fail(&format!("{}: {e}", cuda.display())))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    let mut found = BTreeMap::new();
    while let Some(path) = waiting.pop() {
        if found.contains_key(&path) {
            continue;
        }
        let text = read(&path);
        let quoted = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("#include \"")?.split('"').next());
        waiting.extend(quoted.map(|name| cuda.join(name)).filter(|header| header.is_file()));
        found.insert(path, text);
    }
    found.into_iter().collect()
}

fn target_folder(out: &Path) -> Option<&Path> {
    // The tag is only in folders that cargo made itself.
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    out.ancestors()
        .find(|folder| marks.iter().any(|mark| folder.join(mark).is_file()))
}
