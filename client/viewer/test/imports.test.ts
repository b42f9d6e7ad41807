import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { test } from 'node:test'

// Each module imports only from its own folder and from those before it. The views are
// independent of each other.
const FOLDERS = ['contract', 'model', 'presentation', 'browser', 'views', 'main']
const VIEWS = ['trace', 'gradient', 'generation', 'effects', 'live']
const SRC = join(process.cwd(), 'src')

function modules(): string[] {
  const files = readdirSync(SRC, { recursive: true, encoding: 'utf-8' })
  return files.filter((file) => file.endsWith('.ts') && !file.endsWith('.d.ts'))
}

function folderOf(module: string): string {
  return module.split('/')[0]?.replace('.ts', '') ?? ''
}

function rank(folder: string): number {
  return FOLDERS.indexOf(VIEWS.includes(folder) ? 'views' : folder)
}

function importsOf(module: string): string[] {
  const text = readFileSync(join(SRC, module), 'utf-8')
  return Array.from(text.matchAll(/from '(\.[^']+)'/g), ([, path]) =>
    relative(SRC, join(SRC, dirname(module), path ?? '')),
  ).filter((path) => !path.startsWith('..')) // the style sheets are outside
}

test('modules import only from earlier folders, and no view imports another', () => {
  const wrong: string[] = []
  for (const module of modules()) {
    const own = folderOf(module)
    assert.ok(rank(own) >= 0, `${module} is in no known folder`)
    for (const imported of importsOf(module)) {
      const other = folderOf(imported)
      if (other !== own && rank(other) >= rank(own)) wrong.push(`${module} imports ${imported}`)
    }
  }
  assert.deepEqual(wrong, [])
  assert.ok(modules().some((module) => importsOf(module).length > 0))
})

test('modules do not import each other in a circle', () => {
  const visiting: string[] = []
  const done = new Set<string>()
  const circles: string[] = []
  const visit = (module: string): void => {
    const seen = visiting.indexOf(module)
    if (seen >= 0) circles.push([...visiting.slice(seen), module].join(' > '))
    if (seen >= 0 || done.has(module)) return
    visiting.push(module)
    for (const imported of importsOf(module)) visit(`${imported}.ts`)
    visiting.pop()
    done.add(module)
  }
  for (const module of modules()) visit(module)
  assert.deepEqual(circles, [])
})
