//! `fleetune-sim quantize`: a model in another weight format, with ggml's scales or with searched ones.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]

use anyhow::{Context, Result, bail, ensure};
use fleetune_model::{
    base::BaseModel,
    gguf::Metadata,
    infer::{Engine, InputSquares},
    requantize::{ModelQuantizeMethod, requantize},
    weights::WeightFormat,
};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Tokens of the text that are read together.
const BLOCK_TOKENS: usize = 512;

/// Writes a model in another weight format.
#[derive(Clone, Debug, clap::Args)]
pub struct QuantizeArgs {
    /// The model: a GGUF file or a Hugging Face folder.
    #[arg(long)]
    model: PathBuf,
    /// Format of the projections: q8_0, q4_0, q4_1, q5_0, q4_k, q6_k, f16, bf16 or f32.
    #[arg(long)]
    format: String,
    /// How scales are chosen.
    #[arg(long, value_enum, default_value_t = Method::Ggml)]
    method: Method,
    /// Text on which the model shows which columns matter, for the search.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Most tokens of the text that are read.
    #[arg(long, default_value_t = 8192)]
    text_tokens: usize,
    /// The GGUF file to write; a file that is there already is refused.
    #[arg(long)]
    out: PathBuf,
}

/// How scales are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    /// As llama.cpp's plain quantizers, bit for bit.
    Ggml,
    /// By search for the least squared error.
    Search,
}

/// Quantizes, writes and prints one line.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let format =
        WeightFormat::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(&args.format));
    let format = format.with_context(|| format!("--format: {:?} is not known", args.format))?;
    ensure!(args.text.is_none() || args.method == Method::Search, "--text: only for --method search");
    ensure!(!args.out.exists(), "--out: {} is there already", args.out.display());
    let base =
        Arc::new(BaseModel::open(&args.model).with_context(|| format!("model {}", args.model.display()))?);
    let squares =
        args.text.as_deref().map(|path| input_squares(&base, path, args.text_tokens)).transpose()?;
    let method = match (args.method, &squares) {
        (Method::Ggml, _) => ModelQuantizeMethod::Ggml,
        (Method::Search, None) => ModelQuantizeMethod::Search,
        (Method::Search, Some(squares)) => ModelQuantizeMethod::SearchFor(squares),
    };
    let (made, error) = requantize(&base, format, method)?;
    let context = || format!("--out: {}", args.out.display());
    let mut out = BufWriter::new(File::create(&args.out).with_context(context)?);
    made.write_gguf(&Metadata::default(), &mut out).with_context(context)?;
    out.flush().with_context(context)?;
    let bytes = fs::metadata(&args.out).with_context(context)?.len();
    println!("{}: {bytes} bytes, relative error of the weights {:.5}", args.out.display(), error.relative());
    Ok(())
}

fn input_squares(base: &Arc<BaseModel>, path: &Path, tokens_max: usize) -> Result<InputSquares> {
    let text = fs::read_to_string(path).with_context(|| format!("--text: {}", path.display()))?;
    let mut ids = base.tokenizer.encode_ordinary(&text);
    ids.truncate(tokens_max);
    if ids.is_empty() {
        bail!("--text: {} has no tokens", path.display());
    }
    let length = BLOCK_TOKENS.min(base.config.context_length);
    let texts: Vec<Vec<u32>> = ids.chunks(length).map(<[u32]>::to_vec).collect();
    Ok(Engine::new(Arc::clone(base)).input_squares(&texts)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::EMBEDDED_BASE;

    fn args(folder: &Path, out: &str) -> QuantizeArgs {
        let model = folder.join("base.gguf");
        fs::write(&model, EMBEDDED_BASE).expect("a model file");
        let (format, method) = ("q4_0".to_owned(), Method::Ggml);
        QuantizeArgs { model, format, method, text: None, text_tokens: 64, out: folder.join(out) }
    }

    #[test]
    fn every_method_writes_a_model_of_the_same_size() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().join("text.txt");
        fs::write(&text, "What is the matter, my lord? ".repeat(20)).expect("a text");
        let mut files = Vec::new();
        for (out, method, text) in [
            ("ggml.gguf", Method::Ggml, None),
            ("search.gguf", Method::Search, None),
            ("text.gguf", Method::Search, Some(text)),
        ] {
            let args = QuantizeArgs { method, text, ..args(folder.path(), out) };
            run(&args).expect("a quantized model");
            let base = BaseModel::open(&args.out).expect("a model that opens");
            assert_eq!(base.layers[0].projections[0].format(), WeightFormat::Q4_0);
            files.push(fs::read(&args.out).expect("a file"));
        }
        assert!(files.iter().all(|file| file.len() == files[0].len()));
        assert!(files[0] != files[1] && files[1] != files[2]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let check = |change: &dyn Fn(&mut QuantizeArgs), expected: &str| {
            let mut args = args(folder.path(), "out.gguf");
            change(&mut args);
            let error = format!("{:#}", run(&args).expect_err("refused"));
            assert!(error.contains(expected), "{error}");
        };
        check(&|args| args.format = "q3_k".to_owned(), "--format");
        check(&|args| args.text = Some(args.model.clone()), "only for --method search");
        check(&|args| args.out = args.model.clone(), "is there already");
        check(
            &|args| {
                let empty = args.model.with_file_name("empty.txt");
                fs::write(&empty, "").expect("an empty file");
                (args.method, args.text) = (Method::Search, Some(empty));
            },
            "has no tokens",
        );
    }
}
